"""Variables of user code outside of objects: globals, those of enclosing functions, and attributes of classes."""

from __future__ import annotations

import dis
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from lightning_dp.step.object_kinds import NOT_OWN, own_classes
from lightning_dp.step.snapshot import OWN_OUTSIDE

_ASSIGNS = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
_CONTAINERS = (list, dict, deque, set)
_MOST = 1_000
"""Entries of a container, with those of containers in it, up to which its content is restored after a trial."""
_ROOTS = ("training_step", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward")


class Variables(MutableMapping[str, Any]):
    """A view of variables by name; those that have no value are left out.

    Args:
        names: of the variables.
        read: returns the value of a variable; raises KeyError if it has none.
        write: sets a variable.
        delete: removes the value of a variable.
        copy: returns all values by name, faster than one by one.
    """

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        read: Callable[[str], Any],
        write: Callable[[str, Any], Any],
        delete: Callable[[str], Any],
        copy: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._names, self._read, self._write, self._delete, self._copy = names, read, write, delete, copy
        setattr(self, OWN_OUTSIDE, frozenset(vars(self)))  # a snapshot would copy all that they lead to

    @classmethod
    def of_dict(cls, held: dict[str, Any], names: frozenset[str]) -> Variables:
        """Return a view of some entries of a dictionary, such as the globals of a Python module."""
        return cls(lambda: (name for name in names if name in held), held.__getitem__, held.__setitem__, held.pop)

    @classmethod
    def of_cells(cls, cells: dict[str, types.CellType]) -> Variables:
        """Return a view of variables of enclosing functions."""

        def write(name: str, value: Any) -> None:
            cells[name].cell_contents = value

        def delete(name: str) -> None:
            del cells[name].cell_contents

        return cls(
            lambda: (name for name, cell in cells.items() if cell != types.CellType()),
            lambda name: cells[name].cell_contents,
            write,
            delete,
        )

    @classmethod
    def of_class(cls, kind: type[Any]) -> Variables:
        """Return a view of the attributes of a class."""
        held = vars(kind)
        return cls(
            lambda: held,
            held.__getitem__,
            lambda name, value: setattr(kind, name, value),
            lambda name: delattr(kind, name),
            held.copy,
        )

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


class UserVariables:
    """The variables that some functions, and the functions which these name, may use to keep values between steps.

    Found are variables that they assign, and containers that they name; also attributes of given classes. Python
    modules other than those of the functions are not searched.

    Args:
        functions: of the user.
        classes: whose methods are searched if a function names one of them as an attribute.
    """

    def __init__(self, functions: Iterable[Any], classes: Iterable[type[Any]] = ()) -> None:
        self._classes, self._seen = [*dict.fromkeys(classes)], set[int]()
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._cells: dict[str, types.CellType] = {}
        for function in functions:
            self._search(function)
        self.watched = [Variables.of_dict(held, frozenset(names)) for held, names in self._globals.values()]
        """Views of all that was found."""
        small = [
            (held, {name for name in names if _is_small(held.get(name))}) for held, names in self._globals.values()
        ]
        # a list of an enclosing function, to which user code appends, shows the runs of checks too
        cells = {name: cell for name, cell in self._cells.items() if not isinstance(_content(cell), list)}
        self.restored = [*(Variables.of_dict(held, frozenset(names)) for held, names in small)]
        """Views of what is restored after a trial; classes are restored with their objects."""
        self.restored += [Variables.of_cells(cells)]
        self.watched += [Variables.of_cells(self._cells), *map(Variables.of_class, self._classes)]

    @classmethod
    def of_objects(cls, owners: Iterable[Any]) -> UserVariables:
        """Return the variables of the steps and hooks of a module and of callbacks."""
        kinds = [kind for owner in owners for kind in own_classes(owner.__class__)]
        roots = (each for kind in kinds for name, each in vars(kind).items() if name in _ROOTS or name[:3] == "on_")
        return cls([*roots], kinds)

    def _search(self, function: Any) -> None:
        for name in ("fget", "func", "__func__"):  # of a property, a partial function and a method
            function = getattr(function, name, function)
        if isinstance(function, types.FunctionType) and id(function.__code__) not in self._seen:
            self._seen.add(id(function.__code__))
            if isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
                self._search(inner)
            names, assigned = _names_in(function.__code__)
            _, found = self._globals.setdefault(id(function.__globals__), (function.__globals__, set()))
            for name in names:
                value = function.__globals__.get(name)
                if name in assigned or isinstance(value, _CONTAINERS):
                    found.add(name)
                elif isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                    self._search(value)
                for kind in self._classes:
                    self._search(vars(kind).get(name))
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if name in assigned or isinstance(_content(cell), _CONTAINERS):
                    self._cells[f"{name} of {function.__qualname__}"] = cell
                elif _is_own(_content(cell)):
                    self._search(_content(cell))


def _is_own(value: Any) -> bool:
    """Tell whether something is a function that is not of Python, torch, Lightning or this package."""
    return isinstance(value, types.FunctionType) and value.__module__.partition(".")[0] not in NOT_OWN


def _names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return the names of globals and attributes in a function, with functions in it, and the variables it assigns."""
    names, assigned, codes = set[str](), set[str](), [code]
    for each in codes:  # grows
        names |= {*each.co_names}
        assigned |= {str(one.argval) for one in dis.get_instructions(each) if one.opname in _ASSIGNS}
        codes += [constant for constant in each.co_consts if isinstance(constant, types.CodeType)]
    return names, assigned


def _content(cell: types.CellType) -> Any:
    return None if cell == types.CellType() else cell.cell_contents


def _is_small(value: Any) -> bool:
    """Tell whether a value is no container, or one with few entries in all."""
    count, values = 0, [value]
    for one in values:  # grows
        if isinstance(one, _CONTAINERS):
            count += len(one)
            if count > _MOST:
                return False
            values += one.values() if isinstance(one, dict) else one
    return True
