"""Views of variables by name: entries of dictionaries, variables of enclosing functions, slots, state of classes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from lightning_dp.sandbox.object_kinds import slots_of, state_of_class
from lightning_dp.sandbox.snapshot import OWN_OUTSIDE

_EMPTY = types.CellType()


class Variables(MutableMapping[str, Any]):
    """A view of variables by name; those that have no value are left out.

    Args:
        names: of the variables.
        read: returns the value of a variable; raises KeyError if it has none.
        write: sets a variable.
        delete: removes the value of a variable.
        copy: returns all values by name, faster than one by one.
        source: the mapping whose entries the variables are, if it has no others.
        places: where the variables are, as a dictionary and a key in it each, if they are all entries of dictionaries.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        read: Callable[[str], Any],
        write: Callable[[str, Any], Any],
        delete: Callable[[str], Any],
        copy: Callable[[], dict[str, Any]] | None = None,
        source: Mapping[str, Any] | None = None,
        places: Sequence[tuple[dict[str, Any], str]] = (),
    ) -> None:
        self._names, self._read, self._write, self._delete, self._copy = names, read, write, delete, copy
        self.source, self.places = source, places

    @classmethod
    def of_dict(cls, held: dict[str, Any], names: frozenset[str]) -> Variables:
        """Return a view of some entries of a dictionary, such as the globals of a Python module."""

        def copy() -> dict[str, Any]:
            return {name: held[name] for name in names if name in held}

        places = [(held, name) for name in names]
        return cls(copy, held.__getitem__, held.__setitem__, held.pop, copy, places=places)

    @classmethod
    def of_cells(cls, cells: dict[str, types.CellType]) -> Variables:
        """Return a view of variables of enclosing functions."""

        def write(name: str, value: Any) -> None:
            cells[name].cell_contents = value

        def delete(name: str) -> None:
            del cells[name].cell_contents

        def copy() -> dict[str, Any]:
            return {name: cell.cell_contents for name, cell in cells.items() if cell != _EMPTY}

        return cls(copy, lambda name: cells[name].cell_contents, write, delete, copy)

    @classmethod
    def of_slots(cls, owner: Any) -> Variables:
        """Return a view of the slots of an object."""
        names = slots_of(owner.__class__)
        return cls(
            lambda: (name for name in names if hasattr(owner, name)),
            lambda name: getattr(owner, name),
            lambda name, value: object.__setattr__(owner, name, value),
            lambda name: object.__delattr__(owner, name),
        )

    @classmethod
    @functools.lru_cache(4096)
    def of_class(cls, kind: type[Any]) -> Variables:
        """Return a view of the attributes of a class, the same one each time; only those that are values are named."""
        held = vars(kind)
        return cls(
            lambda: state_of_class(kind),
            held.__getitem__,
            lambda name, value: setattr(kind, name, value),
            lambda name: delattr(kind, name),
            held.copy,
            held,
        )

    def clear(self) -> None:
        """Remove the values of all that can have none."""
        for name in self:
            self._delete(name)

    def copy(self) -> dict[str, Any]:
        """Return the values by name."""
        return {name: self._read(name) for name in self._names()} if self._copy is None else self._copy()

    def __getitem__(self, name: str) -> Any:
        return self._read(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(name, value)

    def __delitem__(self, name: str) -> None:
        self._delete(name)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._names()])

    def __len__(self) -> int:
        return len([*self._names()])


setattr(
    Variables, OWN_OUTSIDE, frozenset(("_names", "_read", "_write", "_delete", "_copy", "source", "places"))
)  # lead to everything
