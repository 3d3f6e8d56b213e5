"""Collectives of user code on several processes, which do not communicate in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from typing_extensions import override

from lightning_dp.sandbox.readings import note_extremes
from lightning_dp.step.reduction import AllReduce
from lightning_dp.strategies.facts import RunFacts

if TYPE_CHECKING:
    from lightning_dp.strategies.fit import PrivateFit


class Collectives(NamedTuple):
    """The collectives of user code. In the sandbox, which ranks may enter a different number of times, each rank gets
    what ``AllReduce.of_others`` takes the others to give. What they give in a step is compared as values are that user
    code reads, because a rare record of another rank may be behind it.

    Args:
        reduction: of the private step; ranks that have none get their own values in the sandbox.
        rank: number of this process.
        world_size: number of processes.
        is_on_trial: whether user code runs in the sandbox.
    """

    reduction: Any
    rank: int
    world_size: int
    is_on_trial: bool

    def _of_others(self, tensor: Tensor) -> Tensor:
        return self.reduction.of_others(tensor) if isinstance(self.reduction, AllReduce) else tensor

    def reduce(self, call: Callable[..., Any], tensor: Any, group: Any, reduce_op: Any) -> Any:
        """Reduce a tensor over ranks; in the sandbox, this rank's with those that the others are taken to give."""
        if not self.is_on_trial:
            found = call(tensor, group, reduce_op)
            note_extremes(found)
            return found
        name = str(reduce_op).rpartition(".")[2].lower()
        if not isinstance(tensor, Tensor) or name not in ("mean", "avg", "sum"):
            return tensor
        total = tensor + (self.world_size - 1) * self._of_others(tensor)
        return total if name == "sum" else (total / self.world_size).to(tensor.dtype)

    def all_gather(self, call: Callable[..., Any], tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        """Gather a tensor of all ranks; in the sandbox, this rank's with those that the others are taken to give."""
        if not self.is_on_trial:
            gathered: Tensor = call(tensor, group, sync_grads)
            note_extremes(gathered)
            return gathered
        other = self._of_others(tensor)
        return torch.stack([tensor if rank == self.rank else other for rank in range(self.world_size)])

    def broadcast(self, call: Callable[..., Any], obj: Any, src: int) -> Any:
        """Return one rank's object on every rank; in the sandbox, what another rank is taken to give."""
        if not self.is_on_trial:
            given = call(obj, src)
            note_extremes(torch.tensor(given) if isinstance(given, float) else given)
            return given
        if isinstance(obj, float):
            return float(self._of_others(torch.tensor(obj, dtype=torch.float64)))
        return self._of_others(obj) if isinstance(obj, Tensor) else obj


class Together(RunFacts, Strategy):
    """The collectives of user code under a Trainer's strategy for several processes."""

    _fit: PrivateFit | None
    global_rank: int
    world_size: int

    @property
    def _collectives(self) -> Collectives:
        reduction = None if self._fit is None else self._fit.step.reduction
        return Collectives(reduction, self.global_rank, self.world_size, self.is_on_trial)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        return self._collectives.reduce(super().reduce, tensor, group, reduce_op)  # type: ignore[safe-super]

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self._collectives.all_gather(super().all_gather, tensor, group, sync_grads)  # type: ignore[safe-super]

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._collectives.broadcast(super().broadcast, obj, src)  # type: ignore[safe-super]


@contextmanager
def in_fabric(strategy: Any, now: Callable[[], Collectives]) -> Iterator[None]:
    """Let the collectives of a Fabric's strategy treat user code as those of a Trainer's, within a block.

    Args:
        strategy: for several processes.
        now: returns the collectives as they are to act now.
    """
    reduce, gather, broadcast, wait = strategy.all_reduce, strategy.all_gather, strategy.broadcast, strategy.barrier

    def all_reduce(tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return now().reduce(reduce, tensor, group, reduce_op)

    def all_gather(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return now().all_gather(gather, tensor, group, sync_grads)

    def broadcast_one(obj: Any, src: int = 0) -> Any:
        return now().broadcast(broadcast, obj, src)

    def barrier(*args: Any, **kwargs: Any) -> None:
        if not now().is_on_trial:
            wait(*args, **kwargs)

    own = {"all_reduce": all_reduce, "all_gather": all_gather, "broadcast": broadcast_one, "barrier": barrier}
    strategy.__dict__.update(own)
    try:
        yield
    finally:
        for name in own:
            del strategy.__dict__[name]
