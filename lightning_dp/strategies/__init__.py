"""Lightning strategies that train privately: adapters of ``lightning_dp.step``."""

from lightning_dp.strategies.ddp import DPDDPStrategy
from lightning_dp.strategies.fsdp import DPFSDPStrategy
from lightning_dp.strategies.single_device import DPStrategy

__all__ = ["DPDDPStrategy", "DPFSDPStrategy", "DPStrategy"]
