"""Lightning strategies that train privately; ``private_step`` is the file to read first."""

from lightning_dp.strategies.ddp import DPDDPStrategy
from lightning_dp.strategies.single_device import DPStrategy

__all__ = ["DPDDPStrategy", "DPStrategy"]
