"""Collectives of a strategy for several processes, which do not communicate in the sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from typing_extensions import override

from lightning_dp.step.readings import note_extremes
from lightning_dp.step.reduction import AllReduce
from lightning_dp.strategies.facts import RunFacts

if TYPE_CHECKING:
    from lightning_dp.strategies.fit import PrivateFit


class Together(RunFacts, Strategy):
    """The collectives of user code. In the sandbox, which ranks may enter a different number of times, each rank gets
    what ``AllReduce.of_others`` takes the others to give. What they give in a step is compared as values are that user
    code reads, because a rare record of another rank may be behind it.
    """

    _fit: PrivateFit | None
    global_rank: int
    world_size: int

    def _of_others(self, tensor: Tensor) -> Tensor:
        reduction: Any = None if self._fit is None else self._fit.step.reduction
        return reduction.of_others(tensor) if isinstance(reduction, AllReduce) else tensor

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor over ranks; in the sandbox, this rank's with those that the others are taken to give."""
        if not self.is_on_trial:
            found = super().reduce(tensor, group, reduce_op)  # type: ignore[safe-super]
            note_extremes(found)
            return found
        name = str(reduce_op).rpartition(".")[2].lower()
        if not isinstance(tensor, Tensor) or name not in ("mean", "avg", "sum"):
            return tensor
        total = tensor + (self.world_size - 1) * self._of_others(tensor)
        return total if name == "sum" else (total / self.world_size).to(tensor.dtype)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor of all ranks; in the sandbox, this rank's with those that the others are taken to give."""
        if not self.is_on_trial:
            gathered: Tensor = super().all_gather(tensor, group, sync_grads)  # type: ignore[safe-super]
            note_extremes(gathered)
            return gathered
        other = self._of_others(tensor)
        return torch.stack([tensor if rank == self.global_rank else other for rank in range(self.world_size)])

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return one rank's object on every rank; in the sandbox, what another rank is taken to give."""
        if not self.is_on_trial:
            given = super().broadcast(obj, src)  # type: ignore[safe-super]
            note_extremes(torch.tensor(given) if isinstance(given, float) else given)
            return given
        if isinstance(obj, float):
            return float(self._of_others(torch.tensor(obj, dtype=torch.float64)))
        return self._of_others(obj) if isinstance(obj, Tensor) else obj
