"""Reduction: the object that holds all differences between one process and several."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.clipping import Clipping
from lightning_dp.errors import PrivacyError
from lightning_dp.masks import ParameterMask
from lightning_dp.per_sample._torch import real_view
from lightning_dp.step.accumulator import Accumulator


class Reduction:
    """Communication of a private step within its data-parallel group; this base class is a single process."""

    rank = 0
    """Number of this process in the group."""
    world_size = 1
    """Processes of the group."""
    is_sharded = False
    """True if ranks hold parts of the parameters, so that every rank must run the same forwards, which communicate."""

    # ---------------------------------------------------------------- what every rank has to do alike

    def same_count(self, num: int) -> int:
        """Return the number of microbatches to run: the maximum of ``num`` over ranks if forwards communicate, else
        ``num``.
        """
        return num

    def any(self, flag: bool) -> bool:
        """Tell whether any rank set the flag, if forwards communicate; otherwise return this rank's flag."""
        return flag

    def known_to_all(self, learned: Mapping[str, int]) -> Mapping[str, int]:
        """Return what this rank has learned of parameters, if no other rank may have learned something else."""
        return learned

    def agree(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank, always: for a choice that all ranks make alike."""
        return flag

    def each_rank(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, shape (W, n), from as many values of shape (n,) on each."""
        return values[None]

    @contextmanager
    def on_trial(self, draws: Hashable) -> Iterator[None]:
        """Run user code on trial within the context; see :meth:`of_others`.

        Args:
            draws: random draws of the run; None if its state is compared, not its gradients.
        """
        yield

    def settle(self) -> None:
        """Restore the module's state between two steps: free all gathered parameters."""

    def recover(self) -> None:
        """Restore the module's state between two steps after a caught exception in the user's code."""

    # ---------------------------------------------------------------- norms and sums

    def watch(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give an engine the tensors that the module computes with."""
        engine.set_parameters(parameters)

    def make_accumulator(
        self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int
    ) -> Accumulator:
        """Return the accumulator of one private optimizer."""
        return Accumulator(parameters, clipping, num_statistics)

    def squared_norms(
        self, engine: Any, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        """Return the squared norms of whole per-sample gradients, shape (G, B)."""
        norms: Tensor = engine.squared_norms(groups, masks)
        return norms

    def accumulate(self, engine: Any, weights: Tensor | None, accumulator: Accumulator) -> None:
        """Add the weighted sum of a microbatch's gradients; ``weights``, shape (G, B), is None for a dummy record."""
        if weights is not None:
            engine.accumulate(weights, accumulator.groups, accumulator.views, accumulator.masks, accumulator.scratch)

    # ---------------------------------------------------------------- the release

    @property
    def noise_share(self) -> float:
        """Factor of this rank on the noise std of coordinates that every rank holds: ``1 / sqrt(world_size)``."""
        return 1 / math.sqrt(self.world_size)

    def reduce(self, accumulator: Accumulator) -> None:
        """Sum the accumulators of all ranks, each with its share of the noise."""

    def squared_norm(self, accumulator: Accumulator) -> tuple[float, int]:
        """Return the squared norm and the number of coordinates of a reduced gradient, over all ranks' parts."""
        return squared_length(accumulator.gradient), accumulator.num_active

    def average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Average the gradients of a public optimizer over the ranks."""

    # ---------------------------------------------------------------- trials: all ranks run the same records

    def per_sample_gradients(self, engine: Any, names: Sequence[str]) -> dict[str, Tensor]:
        """Return this rank's part of per-sample gradients for a trial to compare: ``(B, *part)`` per parameter."""
        gradients: dict[str, Tensor] = engine.per_sample_gradients(names)
        return gradients

    def weighted_sum(self, engine: Any, factors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of a weighted sum of gradients for a trial to compare; ``factors`` has shape (B,)."""
        parts = {name: real_view(parameter.detach()) for name, parameter in parameters.items()}
        out = {name: torch.zeros_like(part, dtype=factors.dtype) for name, part in parts.items()}
        engine.accumulate(factors[None], [list(parameters)], out)
        return out

    def parts(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of autograd's gradients, which a trial compares with :meth:`per_sample_gradients`."""
        return dict(gradients)

    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each parameter's figure over all ranks."""
        return dict(parts)


def squared_length(tensor: Tensor) -> float:
    """Return the squared norm of a tensor, computed in float64."""
    return float(torch.linalg.vector_norm(tensor.double())) ** 2


class AllReduce(Reduction):
    """Reduction by one all-reduce per release over the default process group.

    Each of W ranks holds whole samples and the whole gradient, and adds 1 / W of the noise variance.

    Args:
        rank: number of this process.
        world_size: W.
        device: where tensors of the group's collectives are.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self._tried: Any = None  # draws of the last run on trial
        self._given: tuple[list[Tensor], list[Tensor]] | None = None  # in the last run of the same draws, and in this
        self._given_before: list[Tensor] = []

    @override
    @contextmanager
    def on_trial(self, draws: Hashable) -> Iterator[None]:
        before = self._given_before if draws is not None and draws == self._tried else []
        self._given, self._tried = None if draws is None else (before, []), draws
        try:
            yield
        finally:
            self._given_before, self._given = [] if self._given is None else self._given[1], None

    def of_others(self, tensor: Tensor) -> Tensor:
        """Return the tensor that each other rank is taken to give in the sandbox, where ranks do not communicate.

        On trial it is the tensor that this rank gave at the same call of the last run of the same draws, which had
        other records; in the first run and elsewhere, its own. So a gradient that depends on records of other ranks
        differs between two runs, also if it depends on the difference between ranks only.

        Args:
            tensor: of this rank.
        """
        if self._given is None:
            return tensor
        before, given = self._given
        given.append(tensor.detach())
        other = before[len(given) - 1] if len(given) <= len(before) else tensor
        return other if (other.shape, other.dtype) == (tensor.shape, tensor.dtype) else tensor

    @override
    def known_to_all(self, learned: Mapping[str, int]) -> Mapping[str, int]:
        return {}

    @override
    def agree(self, flag: bool) -> bool:
        found = torch.tensor(int(flag), device=self.device)
        with communicating("a choice that all make alike"):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    @override
    def each_rank(self, values: Tensor) -> Tensor:
        own = values.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        with communicating("the comparison of ranks"):
            dist.all_gather(rows, own)
        return torch.stack(rows).to(values.device)

    @override
    def reduce(self, accumulator: Accumulator) -> None:
        """Add the buffers of all ranks: clipped sums, each with its rank's share of the noise.

        Raises:
            RuntimeError: another process died, hung or fell behind.
        """
        with communicating("the sum of a logical step"):
            dist.all_reduce(accumulator.flat)

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


#: Words in the errors that torch's back ends raise if another process is lost.
_LOST = re.compile("gloo|nccl|connection|socket|timed? ?out|broken pipe", re.IGNORECASE)


@contextmanager
def communicating(what: str, *, among_others: bool = False) -> Iterator[None]:
    """Explain the error if another process does not take part in a communication.

    Args:
        what: name of the communication, for the message.
        among_others: whether code within the context may also fail for other reasons; such errors are raised unchanged.

    Raises:
        RuntimeError: another process died, hung or fell behind.
    """
    try:
        yield
    except RuntimeError as error:
        if among_others and (isinstance(error, PrivacyError) or not _LOST.search(str(error))):
            raise
        raise RuntimeError(
            f"Expected every rank to take part in {what}, got {error}. Another process died, hung or fell behind: end "
            "what is left of the run and resume all of them from the newest checkpoint, whose ledger is whole."
        ) from error
