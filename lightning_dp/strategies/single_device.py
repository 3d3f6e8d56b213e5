"""Private training on one device: CPU, CUDA or Apple's MPS."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_dp.strategies.private_run import PrivateRun
from lightning_dp.strategies.private_step import PrivateStep


class DPStrategy(PrivateStep, SingleDeviceStrategy):
    __doc__ = PrivateRun.__doc__

    _devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device that the Trainer chose; None until it has."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise ValueError(
                f"Expected one device, got `Trainer(devices={len(devices)})`. DPStrategy trains on one: use DPDDPStrategy, which "
                "takes the same arguments, or `Trainer(devices=1)`."
            )
        self._devices = devices

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise ValueError(
                f"Expected one node, got `Trainer(num_nodes={num_nodes})`. DPStrategy trains on one device: use DPDDPStrategy, which "
                "takes the same arguments."
            )

    @property
    @override
    def root_device(self) -> torch.device:
        return self._devices[0] if self._devices else self._root_device
