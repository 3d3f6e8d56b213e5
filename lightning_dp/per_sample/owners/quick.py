"""Owners of results that follow from few facts about an operation's arguments, as for most operations of a step.

Each function takes the operation's traits and arguments, the tensors among these with their owners, the result, and the
memo of the microbatch. It returns NotImplemented for all other results, whose owners moves.py computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.moves import after_index
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Owners, Rows
from lightning_dp.per_sample.owners.reductions import Step
from lightning_dp.per_sample.owners.views import joined_rows
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.operations import operation_of

if TYPE_CHECKING:
    from lightning_dp.per_sample.owners.traits import Traits

Given = list[tuple[Tensor, Owners]]
"""The tensors among the arguments of an operation, with their owners."""

Quick = Callable[["Traits", Any, Any, Given, Tensor, Memo], Any]
"""Returns the owners of a result, or NotImplemented."""

_UNKNOWN = (IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors that arguments cause if they are given in a way that is not known here."""


def constant(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of a result that holds no data."""
    return NotImplemented if traits.in_place else None


def aligned(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of a result that is computed entry by entry from tensors with the same owners."""
    found, at = None, 0
    for tensor, rows in given:
        if rows is None:
            continue
        if type(rows) is not Rows or rows.axis is None:
            return NotImplemented if are_positions(given, out) else _not_of_rows(traits, rows, given)
        if found is None:
            found, at = rows, rows.axis - tensor.dim()
        elif rows.index is not found.index or rows.axis - tensor.dim() != at:
            return NotImplemented
    if found is None:
        return None if given else NotImplemented
    shape = out.shape
    at += len(shape)
    if at < 0 or shape[at] != found.num:
        return NotImplemented
    return found if at == found.axis else found.moved(at)


def are_positions(given: Given, out: Tensor) -> bool:
    """Tell whether an operation computes positions of rows from owned ones and from running sums of numbers of rows.

    So do the position of a node within its graph, and its place in a dense batch. They belong to the owners of the
    positions, as the edges of a graph do: their numbers count the nodes of the graphs before it, too.
    """
    of_rows = False
    if out.is_floating_point() or out.is_complex():
        return False
    for tensor, rows in given:
        if isinstance(rows, Mixed) and (not rows.is_running or tensor.is_floating_point() or tensor.shape != out.shape):
            return False
        if isinstance(rows, Rows):
            of_rows |= tensor.shape == out.shape
    return of_rows


def are_from_elsewhere(given: Given) -> bool:
    """Tell whether no tensor is known to hold data of a batch: each is a constant, or no operation has made it."""
    return all(rows is None or rows is MIXED for _, rows in given)


def along(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of a result whose axis of owners is known without a look at values."""
    found: Any = None
    data, at = None, 0
    for tensor, rows in given:
        if rows is None:
            continue
        if type(rows) is not Rows or rows.axis is None:
            return _not_of_rows(traits, rows, given)
        if found is None:
            found, data, at = rows, tensor, rows.axis - tensor.dim()
        elif traits.joins:
            if rows.index is not found.index or rows.axis - tensor.dim() != at:
                return NotImplemented
        else:
            return NotImplemented
    if found is None or data is None:
        return None if given else NotImplemented
    if traits.axis_after is None:
        return NotImplemented
    try:
        axis = traits.axis_after(data, found.axis, args, kwargs, out)
        if (
            axis is None
            and traits.reduces
            and found.sole is None
            and not (len(args) > 1 and isinstance(args[1], Tensor))
        ):
            return traits.mixed
        if axis is None or out.shape[axis] != found.num:
            return NotImplemented
    except _UNKNOWN:
        return NotImplemented
    return found if axis == found.axis else found.moved(axis)


def by_index(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of rows that an index selects, or of sums of rows by an index."""
    if len(given) < 2:
        return along(traits, args, kwargs, given, out, memo)
    try:
        with unfollowed():
            found = after_index(traits.name, args, given, memo)
        if found is None or found.axis is None or out.shape[found.axis] != found.num:
            return NotImplemented
    except _UNKNOWN:
        return NotImplemented
    return found


def joined(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of tensors that are put together, one after the other."""
    found = along(traits, args, kwargs, given, out, memo)
    if found is not NotImplemented or kwargs.keys() - {"dim"}:
        return found
    owned = [(tensor, rows) for tensor, rows in given if isinstance(rows, Rows)]
    if (
        not owned
        or any(isinstance(rows, Mixed) for _, rows in given)
        or any(rows.axis is None or rows.num == 1 for _, rows in owned)
    ):
        return NotImplemented
    try:
        with unfollowed():
            step = Step(traits.func, args, kwargs, out, owned, owned[0][1].index, memo)
            found = joined_rows(step, tensors_in((args[0],), {}), {id(tensor): rows for tensor, rows in owned})
        if not isinstance(found, Rows) or found.axis is None or out.shape[found.axis] != found.num:
            return NotImplemented
    except _UNKNOWN:
        return NotImplemented
    return found


def unknown(traits: Traits, args: Any, kwargs: Any, given: Given, out: Tensor, memo: Memo) -> Any:
    """Return the owners of the result of an operation of which nothing is known: several rows make it mixed."""
    found: Any = None if given else NotImplemented
    for _, rows in given:
        if rows is None:
            continue
        if type(rows) is not Rows or rows.axis is None:
            return _not_of_rows(traits, rows, given)
        found = NotImplemented if rows.num == 1 or found is NotImplemented else traits.mixed
    known = operation_of(traits.func)
    return NotImplemented if known is not None and known.keeps_rows else found


def _not_of_rows(traits: Traits, owners: Owners, given: Given) -> Any:
    """Return the owners of a result computed from a tensor that has no axis of owners."""
    if type(owners) is Mixed:
        return traits.mixed if owners is MIXED and not are_from_elsewhere(given) else owners
    return NotImplemented
