"""Comparison of all ranks of a run, in settings and noise, data and weights; ranks that differ are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.snapshot import few_values
from lightning_dp.step.step import PrivateStep
from lightning_dp.system.local import is_sharded

#: Arguments that may differ, because they change neither privacy nor communication; or that other facts cover.
_FREE = frozenset({"memory", "tune_process", "strict_logging", "seed", "unit"})
#: Where an object without a text of its own is in memory, which differs between processes.
_ADDRESS = re.compile(" at 0x[0-9a-f]+")
_PLACES = 8  # values of each tensor that are compared
_TOLERANCE = 1e-3  # of the largest of them: devices of different kinds round differently


def check_ranks(step: PrivateStep, host: Any) -> None:
    """Check that every rank trains the same weights with the same noise, on the same dataset.

    Ranks share out the dataset by position. If a record had two positions, two ranks could draw it for one batch, and
    its contribution could be twice the sensitivity. All ranks call this together.

    Args:
        step: the private step, in a logical batch that has begun.
        host: holds this rank's records as ``training``, and its optimizers as ``others()``.

    Raises:
        PrivacyError: ranks differ.
    """
    if step.reduction.world_size == 1:
        return
    facts = _facts(step)
    found = step.reduction.each_rank(torch.tensor([mark_of(fact) for fact in facts.values()], dtype=torch.float64))
    differing = [name for name, same in zip(facts, (found == found[0]).all(0).tolist(), strict=True) if not same]
    if differing:
        raise PrivacyError(
            f"Expected the same settings on every rank, got different values of {', '.join(differing)}. Noise and "
            "clipping would not be those of the ledger: build strategy, loaders, callbacks and module alike on every "
            "rank."
        )
    _check_data(step.reduction.each_rank(torch.tensor(host.training.marks(), dtype=torch.float64)))
    _check_weights(step, host.others())


def _facts(step: PrivateStep) -> dict[str, Any]:
    """Return public facts of a run by name; their number is the same on every rank."""
    settings = {
        each.name: getattr(step.settings, each.name)
        for each in dataclasses.fields(step.settings)
        if each.name not in _FREE
    }
    return {
        **{name: f"{value}" for name, value in settings.items()},
        **step.plan.state_dict(),
        "callbacks": step.mechanisms.described(),
        "releases": [
            (index, f"{each.sigma:.6g}", f"{each.noise_std:.6g}", f"{each.sensitivity:.6g}")
            for index, each in sorted(step.releases.items())
        ],
        "parameters": [(name, tuple(p.shape), p.requires_grad) for name, p in step.module.named_parameters()],
        "masks": [
            (name, few_values(mask.active, 64).tolist())
            for accumulator in step.accumulators.values()
            for name, mask in sorted((accumulator.masks_of_norms or {}).items())
        ],
    }


def mark_of(fact: Any) -> float:
    """Return a whole number that is equal for equal facts, from 1 on, and exact in float64.

    Example:
        >>> mark_of(("a", 1)) == mark_of(("a", 1)) != mark_of(("a", 2))
        True
    """
    content = fact if isinstance(fact, bytes) else _ADDRESS.sub("", repr(fact)).encode()
    return float(1 + int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "big"))


def _check_data(marks: Tensor) -> None:
    """Compare the marks of all ranks, shape (W, n): of a stream if the first of them is 1, else of a dataset."""
    is_stream, users, marks = bool(marks[0, 0]), marks[:, 1], marks[:, 2:]
    if is_stream:
        if bool((marks == marks[0]).all()) and len({*marks[0].tolist()}) > 1:
            raise PrivacyError(
                "Expected a stream to give each rank records of its own, got the same first records on every rank. A "
                "record would count once per rank in one batch: let the dataset yield a part by "
                "torch.distributed.get_rank()."
            )
        return
    if bool((users != users[0]).any()):
        raise PrivacyError(
            "Expected the same users on every rank, got records that belong to others on another rank. Two ranks could "
            "draw one user for one batch: compute the ids alike on every rank."
        )
    compared = (marks > 0).all(0)
    moved = int(((marks != marks[0]).any(0) & compared).sum())
    if moved and 4 * moved >= int(compared.sum()):
        raise PrivacyError(
            f"Expected the same dataset in the same order on every rank, got other records at {moved} of "
            f"{int(compared.sum())} positions. Ranks share out positions, so a record with two of them could count "
            "twice in one batch: build and shuffle the dataset alike on every rank, and leave its division among ranks "
            "to the strategy."
        )


def _check_weights(step: PrivateStep, others: list[Any]) -> None:
    """Compare a few values of replicated parameters, and the learning rates, of all ranks."""
    held: dict[str, Tensor] = {}
    for number, other in enumerate(others):
        for index, group in enumerate(getattr(other, "param_groups", ())):
            held[f"the learning rate of optimizer {number}, group {index}"] = torch.tensor([float(group["lr"])])
    replicated = {name: p for name, p in step.module.named_parameters() if not is_sharded(p) and p.numel()}
    held |= {name: few_values(p, _PLACES) for name, p in replicated.items()}
    if not held:
        return
    device = next(step.module.parameters()).device
    ends = torch.tensor([len(values) for values in held.values()]).cumsum(0).tolist()
    found = step.reduction.each_rank(torch.cat([values.to(device, torch.float64) for values in held.values()]))
    for name, low, high in zip(held, [0, *ends], ends, strict=False):
        part = found[:, low:high]
        if not bool(((part - part[0]).abs() <= _TOLERANCE * part.abs().max()).all() or part.isnan().all()):
            raise PrivacyError(
                f"Expected equal replicas, got different values of {name!r} on two ranks. Something that only one rank "
                "sees moved them (its own records, a figure logged without sync_dist=True), so the released gradient "
                "is that of no model. Let each rank do the same with the same values."
            )


def elsewhere() -> PrivacyError:
    """Return the error of this rank for an error on another one."""
    return PrivacyError("Another rank could not follow the uses of private parameters.")
