"""The user's functions that others reach through objects, and in which these may keep values between steps."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_dp.sandbox.object_kinds import NOT_OWN, WAYS, entries_of, slots_of
from lightning_dp.sandbox.snapshot import OWN_OUTSIDE

_MOST = 256
"""Values that are followed."""


def is_own_function(value: Any) -> bool:
    """Tell whether something is a function that is not of Python, torch, Lightning or this package."""
    return isinstance(value, types.FunctionType) and str(value.__module__).partition(".")[0] not in NOT_OWN


def content_of(cell: types.CellType) -> Any:
    """Return the value of a variable of an enclosing function; None if it has none."""
    return None if cell == types.CellType() else cell.cell_contents


def functions_in(values: Iterable[Any]) -> list[Any]:
    """Return the user's functions that some values lead to: as arguments of partial functions, in containers, as
    attributes of objects and layers, and by variables that such functions name.
    """
    found, seen, values = list[Any](), set[int](), [*values]
    for one in values:  # grows
        if id(one) in seen or len(seen) == _MOST:
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            if is_own_function(one):
                found.append(one)
                named = [one.__globals__.get(name) for name in one.__code__.co_names]
                values += [*map(content_of, one.__closure__ or ()), *(each for each in named if WAYS[type(each)])]
        elif isinstance(one, types.MethodType):
            values += [one.__func__, one.__self__]
        elif WAYS[type(one)] == "own" or isinstance(one, nn.Module):
            values += attributes_of(one)
        elif WAYS[type(one)] in ("container", "fixed", "bound"):
            values += entries_of(one)
    return found


def attributes_of(owner: Any) -> list[Any]:
    """Return the values of an object's attributes and slots, without those that lead to everything."""
    kind: Any = type(owner)
    outside = getattr(kind, OWN_OUTSIDE, ())
    held = {name: getattr(owner, name, None) for name in slots_of(kind)} | getattr(owner, "__dict__", {})
    return [value for name, value in held.items() if name not in outside]
