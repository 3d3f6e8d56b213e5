"""Private training in N processes on any number of nodes: one all-reduce a logical step, no DistributedDataParallel."""

from __future__ import annotations

import math
import pickle
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.accounting import Ledger
from lightning_dp.strategies.private_run import PrivateRun
from lightning_dp.strategies.private_step import PrivateStep


class _LedgerLauncher(_MultiProcessingLauncher):
    """Brings ledger, plan and step back from the spawned or forked processes, together with the weights."""

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        strategy: Any = trainer.strategy
        state = (
            strategy.ledger.state_dict(),
            strategy._plan,
            strategy.steps_taken,
            strategy._unledgered,
            strategy.notes,
        )
        return {**super().get_extra_results(trainer), "lightning_dp": pickle.dumps(state)}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        ledger, plan, step, unledgered, notes = pickle.loads(extra.pop("lightning_dp"))  # from a process of our own
        super().update_main_process_results(trainer, extra)
        strategy: Any = trainer.strategy
        strategy.ledger, strategy._plan, strategy._step = Ledger.from_state_dict(ledger), plan, step
        strategy._unledgered = unledgered
        strategy.take_notes(notes)


class DPDDPStrategy(PrivateStep, DDPStrategy):
    __doc__ = PrivateRun.__doc__

    @override
    def configure_ddp(self) -> None:
        """Starts every replica from rank 0's state; the module is not wrapped, since gradients are summed once a step."""
        module = self._module
        _sync_module_states(module)
        self.ledger = Ledger.from_state_dict(self.broadcast(self.ledger.state_dict()))

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces over ranks, but not on a microbatch that is not the last: how many there are differs between ranks."""
        return tensor if self._partial else super().reduce(tensor, group, reduce_op)

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if isinstance(self._launcher, _MultiProcessingLauncher):
            self._launcher = _LedgerLauncher(self, start_method=self._launcher._start_method)

    @override
    def _sum_over_ranks(self, flat: Tensor) -> None:
        """The one all-reduce of a logical step: clipped sums, each with its rank's share of the noise."""
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise RuntimeError(
                f"Expected every rank to take part in the sum of a logical step, got {error}. Another process died, hung or fell "
                "behind: end what is left of the run and resume all of them from the newest checkpoint, whose ledger is whole."
            ) from error

    @override
    def _average_over_ranks(self, parameters: dict[str, nn.Parameter]) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters.values()]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = torch.split(flat, [math.prod(p.shape) for p in parameters.values()])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)

    @override
    def determine_ddp_device_ids(self) -> Any:
        return None if self.root_device.type in ("cpu", "mps") else [self.root_device.index]
