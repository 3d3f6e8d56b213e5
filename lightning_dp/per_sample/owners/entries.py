"""Owners of single entries, where no axis tells them: columns that were sorted each by itself, for example.

Only operations that move entries, or sort them, keep such owners. All others see a tensor that mixes samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.owned import MIXED, Entries, Mixed, Owners, Rows, compressed
from lightning_dp.per_sample.tracking.arguments import replaced

_MOVED = """
    sort gather take_along_dim index_select __getitem__ view reshape flatten unflatten transpose swapaxes movedim
    permute t squeeze unsqueeze flip roll split chunk unbind narrow select contiguous clone detach
"""
_MOVES = frozenset(_MOVED.split())


def by_entry(labels: Tensor, shared: Callable[[Tensor], Rows], name: str) -> Owners:
    """Return the owners given by labels of entries: along one axis, or else entry by entry.

    Args:
        labels: owner of every entry.
        shared: returns rows with these owners along the first axis.
        name: of the operation, for messages.
    """
    found = compressed(labels, shared)
    return Entries.of(labels, name) if found is MIXED else found


def after_sort(labels: Tensor, args: Any, kwargs: Any, out: Any, shared: Callable[[Tensor], Rows]) -> list[Owners]:
    """Return the owners of sorted values, and of their places before.

    The places are mixed: they may only say where values go, because ranks in a batch depend on all its samples.

    Args:
        labels: owner of every entry before.
        args: arguments of the sort.
        kwargs: the same, by name.
        out: its result.
        shared: returns rows with given owners along the first axis.
    """
    axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return [by_entry(labels.gather(axis, out[1]), shared, "sort"), Mixed("sort")]


def after_mixed(func: Any, args: Any, kwargs: Any, owners: Mixed, out: Any, shared: Callable[[Tensor], Rows]) -> Any:
    """Return the owners of each result of an operation on a tensor without an axis of owners.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: the same, by name.
        owners: of one of its arguments.
        out: its result.
        shared: returns rows with given owners along the first axis.
    """
    name, first = getattr(func, "__name__", ""), args[0] if args else None
    if not isinstance(owners, Entries) or name not in _MOVES or owners.labels.shape != getattr(first, "shape", None):
        return owners.spread
    options = {key: option for key, option in kwargs.items() if key != "out"}
    try:
        if name == "sort":
            return after_sort(owners.labels, args, options, out, shared)
        args, options = replaced(args, options, lambda one: owners.labels if one is first else one)
        made = func(*args, **options)
        if any(isinstance(option, torch.dtype) for option in (*args, *options.values())):  # bits as other numbers
            return owners.spread
    except (IndexError, RuntimeError, TypeError, ValueError):  # arguments given in a way that is not known here
        return owners.spread
    return by_entry(made, shared, name) if isinstance(made, Tensor) else [by_entry(one, shared, name) for one in made]
