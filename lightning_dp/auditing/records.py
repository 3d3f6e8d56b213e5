"""Canaries in input space: records that a model can learn only by memorising them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_dp import _validate as check


def _generator(seed: int | None) -> torch.Generator:
    return torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)


def random_records(like: Any, num: int, *, num_classes: int = 2, seed: int | None = None) -> list[Any]:
    """Return records of random numbers with the structure of an example record.

    **Guarantee**: only structure, shapes and types of ``like`` are used.

    Args:
        like: one record of the training set: tensors and whole numbers in any nesting.
        num: number of records, >= 1.
        num_classes: whole numbers are drawn from 0 .. num_classes - 1.
        seed: of the draws; fresh entropy by default.

    Returns:
        ``num`` records with the structure of ``like``; floating-point tensors are standard normal.

    Raises:
        TypeError: ``like`` holds something else.

    Example:
        >>> features, label = random_records((torch.zeros(4), 1), 10, num_classes=3, seed=0)[0]
        >>> features.shape, 0 <= label < 3
        (torch.Size([4]), True)
    """
    generator = _generator(seed)
    classes = check.check_count("num_classes", num_classes)

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            return torch.randint(classes, leaf.shape, generator=generator).to(leaf.dtype)
        if isinstance(leaf, int):
            return int(torch.randint(classes, (), generator=generator))
        raise TypeError(
            f"Expected a record of tensors and whole numbers, got a {type(leaf).__name__} in it. Make the canaries "
            "yourself and pass them to PrivacyAudit(canaries=...)."
        )

    return [tree_map(draw, like) for _ in range(check.check_count("num", num))]


def mislabelled(records: Sequence[Any], *, num_classes: int, seed: int | None = None) -> list[Any]:
    """Return pairs (input, label), each with a wrong label.

    **Guarantee**: none for the given records. They must NOT be in the training set (validation or public records are
    fine), because a record and its canary would count as two.

    Args:
        records: pairs (input, label), labels whole numbers or integer tensors of no dimension.
        num_classes: labels are 0 .. num_classes - 1; >= 2.
        seed: of the draws; fresh entropy by default.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> [label for _, label in mislabelled([("a", 0), ("b", 1)], num_classes=2)]
        [1, 0]
    """
    if check.check_count("num_classes", num_classes) < 2:
        raise ValueError(f"Expected num_classes >= 2, got num_classes={num_classes}. No other label would be left.")
    generator = _generator(seed)
    shifts = torch.randint(1, num_classes, (len(records),), generator=generator).tolist()
    return [(features, (label + shift) % num_classes) for (features, label), shift in zip(records, shifts, strict=True)]
