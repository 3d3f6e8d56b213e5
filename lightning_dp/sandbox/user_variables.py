"""Variables of user code outside of objects: globals, those of enclosing functions, and attributes of classes."""

from __future__ import annotations

import argparse
import threading
import types
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lightning_dp.sandbox.held_functions import content_of, functions_in, is_own_function
from lightning_dp.sandbox.names import Names
from lightning_dp.sandbox.object_kinds import NOT_OWN, WAYS, entries_of, own_classes
from lightning_dp.sandbox.variables import Variables

_MOST = 1_000
"""Entries of a container, with those of containers in it, up to which its content is restored after a trial."""
_PLAIN = (bool, int, float, complex, str, type(None))
_ROOTS = ("training_step", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward")
_OF_FUNCTIONS = ("forward", "setup_context", "backward")
"""Methods of a subclass of torch.autograd.Function, of which a step names another one."""


class UserVariables:
    """The variables that some functions, and the functions which these name, may use to keep values between steps.

    Found are variables that they assign; numbers, words, containers, arrays, tensors and objects that they name, with
    their classes if these are of the same package; values of arguments that are not given; attributes of functions that
    they name, if they set some attribute, and of Python modules; also attributes of given classes. Functions of other
    Python modules are not searched.

    Args:
        functions: of the user.
        classes: whose methods are searched if a function names one of them as an attribute.
        layers: whose forwards and hooks are searched too, since a step may call them without their names.
    """

    def __init__(
        self, functions: Iterable[Any], classes: Iterable[type[Any]] = (), layers: Iterable[nn.Module] = ()
    ) -> None:
        self._classes, self._seen, layers = list[Any](dict.fromkeys(classes)), set[int](), [*layers]
        kinds: Any = dict.fromkeys(layer.__class__ for layer in layers)
        self._of_layers = [*dict.fromkeys(each for kind in kinds for each in own_classes(kind))]
        self.names = Names()
        """All names in the functions."""
        self.context: list[ContextVar[Any]] = []
        """Context variables that they name."""
        self.foreign: dict[str, dict[str, Any]] = {}
        """Attributes of Python modules and functions of others, where they may set some."""
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._cells: dict[str, types.CellType] = {}
        self._defaults: dict[str, Any] = {}
        for function in [*functions, *(vars(kind).get("forward") for kind in self._of_layers), *_held_by(layers)]:
            self._search(function)
        num_found = 0
        while num_found != (num_found := len(self._seen)):  # methods that a function names
            for kind in (*self._classes, *self._of_layers):
                for name in ("__call__", *self.names.named):
                    self._search(vars(kind).get(name))
        self.watched: list[Any] = [
            *(Variables.of_dict(held, frozenset(names)) for held, names in self._globals.values()),
            self._defaults,
        ]
        """Views of all that was found."""
        small = [(held, {name for name in names if is_small(held.get(name))}) for held, names in self._globals.values()]
        # a list of an enclosing function, to which user code appends, shows the runs of checks too
        cells = {name: cell for name, cell in self._cells.items() if _may_restore(content_of(cell))}
        self.restored: list[Any] = [*(Variables.of_dict(held, frozenset(names)) for held, names in small)]
        """Views of what is restored after a trial."""
        defaults = {name: value for name, value in self._defaults.items() if is_small(value)}
        views = [Variables.of_class(kind) for kind in self._classes]
        self.restored += [Variables.of_cells(cells), defaults, *views]
        self.watched += [Variables.of_cells(self._cells), *views]

    @classmethod
    def of_objects(cls, owners: Iterable[Any]) -> UserVariables:
        """Return the variables of the steps, hooks and layers of a module and of callbacks, and of functions in
        attributes.
        """
        kinds = [kind for owner in owners for kind in own_classes(owner.__class__)]
        roots = [each for kind in kinds for name, each in vars(kind).items() if name in _ROOTS or name[:3] == "on_"]
        values = [each for owner in owners for each in vars(owner).values()]
        held = functions_in([*values, *roots])
        kinds += [kind for each in values if WAYS[type(each)] == "own" for kind in own_classes(each.__class__)]
        layers = [layer for owner in owners if isinstance(owner, nn.Module) for layer in owner.modules()]
        return cls([*roots, *held], kinds, layers)

    def _search(self, function: Any, attributes: Iterable[str] = ()) -> None:
        for name in ("fget", "func", "__func__"):  # of a property, a partial function and a method
            function = getattr(function, name, function)
        if attributes and isinstance(function, types.FunctionType):
            self._entry(vars(function)).update(attributes)
        if isinstance(function, types.FunctionType) and id(function) not in self._seen:
            self._seen.add(id(function))
            if isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
                self._search(inner)
            names, known = Names(function.__code__), self.names
            for which, found in vars(names).items():
                vars(known)[which] |= found
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            kept = [(f"{index} of {function.__qualname__}", one) for index, one in enumerate(defaults)]
            self._defaults.update((name, one) for name, one in kept if WAYS[type(one)])
            self._entry(function.__globals__)
            self._search(function, names.attributes)
            for name in names.named:
                value = function.__globals__.get(name)
                self._search_global(function, name, value, names)
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if (
                    name in names.assigned
                    or isinstance(content_of(cell), _PLAIN)
                    or _may_keep(content_of(cell), function)
                ):
                    self._cells[f"{name} of {function.__qualname__} {id(cell)}"] = cell
                elif is_own_function(content_of(cell)):
                    self._search(content_of(cell), names.attributes)

    def _search_global(self, function: Any, name: str, value: Any, names: Names) -> None:
        attributes = names.attributes
        is_read = name in function.__globals__ and isinstance(value, _PLAIN)  # whoever sets it
        if is_read or name in names.assigned or _may_keep(value, function):
            self._entry(function.__globals__).add(name)
            self._add_classes(value.__class__ if WAYS[type(value)] == "own" else int)
        elif isinstance(value, types.FunctionType):
            if value.__globals__ is not function.__globals__:
                self.foreign[f"{value.__module__}.{value.__qualname__}"] = vars(value)
                return
            self._search(value, attributes)
        elif isinstance(value, types.ModuleType) and _package_of(value.__name__) in NOT_OWN:
            self.foreign[value.__name__] = vars(value)
        elif isinstance(value, types.ModuleType):
            read = {each for each in names.named if isinstance(vars(value).get(each, value), _PLAIN)}
            if found := attributes | read:
                self._entry(vars(value)).update(found)
        elif isinstance(value, threading.local):
            self._entry(vars(value)).update(names.named | attributes)
        elif isinstance(value, ContextVar):
            self.context += [value] if value not in self.context else []
        elif isinstance(value, type) and _package_of(value.__module__) == _package_of(function.__module__):
            self._add_classes(value)
            for method in _OF_FUNCTIONS if issubclass(value, torch.autograd.Function) else ():
                self._search(vars(value).get(method))

    def _add_classes(self, value: Any) -> None:
        self._classes += [kind for kind in own_classes(value) if kind not in self._classes]

    def _entry(self, held: dict[str, Any]) -> set[str]:
        """Return the names that are watched in a dictionary of variables."""
        return self._globals.setdefault(id(held), (held, set()))[1]


def _package_of(module: str | None) -> str:
    return str(module).partition(".")[0]


def _may_keep(value: Any, function: Any) -> bool:
    """Tell whether a value that a function names may be used to keep others."""
    way = WAYS[type(value)]
    if way == "own":
        known = isinstance(value, (types.SimpleNamespace, argparse.Namespace))
        return known or _package_of(type(value).__module__) == _package_of(function.__module__)
    if way == "bound":
        return any(_may_keep(one, function) for one in entries_of(value))
    return way in ("array", "tensor", "container")


def _held_by(layers: Iterable[nn.Module]) -> list[Any]:
    """Return the user's functions in attributes of layers, and among their hooks."""
    held = [each for layer in layers for each in vars(layer).values()]
    hooks = [each for registry in held if isinstance(registry, OrderedDict) for each in registry.values()]
    return [*filter(is_own_function, (*held, *hooks))]


def _may_restore(value: Any) -> bool:
    """Tell whether a variable of an enclosing function is restored after a trial."""
    return not isinstance(value, list) and (WAYS[type(value)] == "container" or is_small(value))


def is_small(value: Any) -> bool:
    """Tell whether a value is a single one, or holds few in all."""
    count, values, seen = 0, [value], set[int]()
    for one in values:  # grows
        way = WAYS[type(one)]
        if not way or id(one) in seen:
            continue
        seen.add(id(one))
        if way in ("tensor", "array"):
            count += one.numel() if way == "tensor" else one.size
        else:
            held = entries_of(getattr(one, "__dict__", {}) if way == "own" else one)
            count += len(held)
            values += held
        if count > _MOST:
            return False
    return True
