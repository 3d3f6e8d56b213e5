"""Reduction: all that differs between one process and several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.clipping import Clipping
from lightning_dp.step.accumulator import Accumulator


class Reduction(Protocol):
    """Communication of a private step within its data-parallel group."""

    rank: int
    """Number of this process in the group."""
    world_size: int
    """Processes of the group."""

    def same_count(self, num: int) -> int:
        """Return the number of microbatches that every rank runs: ``num``, or the maximum where forwards communicate."""

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; call it before a branch that could differ between ranks."""

    def make_accumulator(
        self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int
    ) -> Accumulator:
        """Return the accumulator of one private optimizer."""

    def combine_norms(self, squared_norms: Tensor) -> Tensor:
        """Return squared norms of whole gradients from those of the parts that this rank holds, shape (G, B)."""

    def reduce(self, accumulator: Accumulator) -> None:
        """Add the accumulators of all ranks, each with its share of the noise."""

    @property
    def noise_share(self) -> float:
        """Factor on the std of the noise that one rank adds."""

    def average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Average the gradients of a public optimizer over the ranks."""


class OneProcess:
    """Reduction of a single process: there is nobody to communicate with."""

    rank = 0
    world_size = 1
    noise_share = 1.0

    def same_count(self, num: int) -> int:
        """Return ``num``."""
        return num

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def make_accumulator(
        self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int
    ) -> Accumulator:
        """Return an accumulator over whole parameters."""
        return Accumulator(parameters, clipping, num_statistics)

    def combine_norms(self, squared_norms: Tensor) -> Tensor:
        """Return the norms: this process holds whole gradients."""
        return squared_norms

    def reduce(self, accumulator: Accumulator) -> None:
        """Leave the sum as it is."""

    def average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Leave the gradients as they are."""


class AllReduce(OneProcess):
    """Reduction by one all-reduce per logical step over the default process group.

    Each of W ranks holds whole samples and the whole gradient, and adds noise of 1 / W of the variance.

    Args:
        rank: number of this process.
        world_size: W.
        device: where tensors of the group's collectives are.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device

    @property
    def noise_share(self) -> float:  # type: ignore[override]
        """``1 / sqrt(W)``."""
        return 1 / math.sqrt(self.world_size)

    @override
    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    @override
    def reduce(self, accumulator: Accumulator) -> None:
        """Add the buffers of all ranks: clipped sums, each with its rank's share of the noise.

        Raises:
            RuntimeError: another process died, hung or fell behind.
        """
        try:
            dist.all_reduce(accumulator.flat)
        except RuntimeError as error:
            raise RuntimeError(
                f"Expected every rank to take part in the sum of a logical step, got {error}. Another process died, hung or fell "
                "behind: end what is left of the run and resume all of them from the newest checkpoint, whose ledger is whole."
            ) from error

    @override
    def average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters.values()]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        parts = torch.split(flat, [math.prod(p.shape) for p in parameters.values()])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
