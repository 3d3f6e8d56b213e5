"""Surroundings: objects of the training framework and of torch that a step reaches, and attributes that it may set."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Set
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_dp.sandbox.object_kinds import entries_of, kind_of, own_classes, state_of_class
from lightning_dp.sandbox.process_settings import process_settings
from lightning_dp.sandbox.refilling import plain_of
from lightning_dp.sandbox.user_variables import UserVariables, is_small
from lightning_dp.sandbox.variables import Variables

_FOLLOWED = (Optimizer, Dataset, DataLoader, Sampler, types.FunctionType)
_PACKAGES = ("lightning", "pytorch_lightning")
#: Classes whose subclasses hold what the user puts there.
_HOLDERS = frozenset(("Callback", "DataHooks", "Dataset", "Sampler", "Optimizer"))
#: Attributes that are watched by themselves.
_KNOWN_OTHERWISE = frozenset(("should_stop", "state", "param_groups"))
_MOST, _MOST_ENTRIES = 500, 64


class _Place(NamedTuple):
    """Some attributes of an object.

    Args:
        label: names the object.
        held: all its attributes.
        names: of those that are looked at.
        only_new: whether none of them was there at first; they are looked for once the number of attributes changes.
    """

    label: str
    held: dict[str, Any]
    names: set[str]
    only_new: bool


class Surroundings:
    """The attributes, by the names that user code sets, of what surrounds a module: the Trainer, its loops and
    callbacks, loaders and datasets, optimizers with their groups, schedulers, parameters. Also the variables of the
    user's code, and settings of the process that it names.

    Such objects change by themselves all the time, so only few attributes are looked at: of classes of the framework
    and of torch those that user code sets by name; of classes of the user's those that user code names at all.

    Args:
        roots: objects from which the others are found.
        parameters: of the module.
        variables: of the user's code.
    """

    def __init__(self, roots: Iterable[Any], parameters: Iterable[Any], variables: UserVariables) -> None:
        names = variables.names
        self._stored = names.attributes | {f"_{name}" for name in names.attributes}
        self._named, self._words = names.named | self._stored, names.words
        self._settings: list[_Place] = []  # what the objects held from the beginning on
        places = [*self._places_of(_found_from(roots))]
        others = {**variables.foreign, **{f"parameter {index}": vars(one) for index, one in enumerate(parameters)}}
        places += itertools.chain.from_iterable(itertools.starmap(self._of_framework, others.items()))
        # Lightning's optimizer shares the groups of the one that it holds
        places = [*{id(place.held): place for place in places if place.names}.values()]
        small = [
            _Place(label, held, {name for name in stored if is_small(held.get(name))}, only_new)
            for label, held, stored, only_new in places
        ]
        watched, restored = ([_view(places)], [_view(small)]) if places else ([], [])
        settings = process_settings(names, variables.context)
        self.watched: list[Any] = [*variables.watched, *watched, *settings]
        """Views of the attributes, of the variables and of settings of the process."""
        self.restored: list[Any] = [*variables.restored, *restored, *settings]
        """Views of what is restored after a trial."""

    @property
    def keys_of_settings(self) -> set[str]:
        """Names in :meth:`settings`, as in the views."""
        return {f"{place.label}.{name}" for place in self._settings for name in place.names}

    def settings(self) -> dict[str, Any]:
        """Return the numbers and words that the objects held from the beginning on, under names that user code sets."""
        return {
            f"{place.label}.{name}": value
            for place in self._settings
            for name, value in plain_of(place.held).items()
            if name in place.names
        }

    def _places_of(self, found: Iterable[Any]) -> Iterator[_Place]:
        for number, one in enumerate(found):
            kind: Any = type(one)
            held = vars(one)
            label = f"{kind.__name__} {number}" if number else kind.__name__
            if _is_of_user(kind):
                of_class = itertools.chain.from_iterable(map(state_of_class, own_classes(kind)))
                names = (self._named & {*held, *of_class} | self._stored) - _KNOWN_OTHERWISE
                yield _Place(label, held, names, only_new=names.isdisjoint(held))
            else:
                # numbers of schedulers are compared anyway
                yield from self._of_framework(label, held, judged="lr_scheduler" in kind.__module__)
            groups = (one.defaults, *one.param_groups) if self._words and isinstance(one, Optimizer) else ()
            for index, group in enumerate(groups):
                numbers = {name for name, value in group.items() if isinstance(value, (int, float))}
                yield _Place(f"{label}[{index}]", group, self._words - numbers - {"params"}, only_new=False)

    def _of_framework(self, label: str, held: dict[str, Any], *, judged: bool = False) -> Iterator[_Place]:
        """Yield what user code may set: numbers and words that are there already, or more attributes. Other attributes
        lead to the rest of the framework.
        """
        names = self._stored - _KNOWN_OTHERWISE
        settings = names & plain_of({name: held[name] for name in names & held.keys()}).keys()
        if settings and not judged:
            self._settings.append(_Place(label, held, settings, only_new=False))
        yield _Place(label, held, names - held.keys() | settings, only_new=not settings)


def _found_from(roots: Iterable[Any]) -> list[Any]:
    """Return the objects of the framework, optimizers, loaders with their collate functions, and datasets to which
    others lead, each once.
    """
    waiting, found, seen, collating = [*roots], list[Any](), set[int](), set[int]()
    for one in waiting:  # grows
        if id(one) in seen or len(found) >= _MOST:
            continue
        seen.add(id(one))
        follows = id(one) in collating or _is_followed(one.__class__)
        if isinstance(one, (Mapping, MutableSequence, tuple, Set)):
            entries = entries_of(one)
            waiting += entries if len(entries) <= _MOST_ENTRIES else []
        elif follows and isinstance(held := getattr(one, "__dict__", None), dict):
            found.append(one)
            waiting += held.values()
            collating.add(id(held.get("collate_fn")))
    return found


@functools.lru_cache(4096)
def _is_followed(kind: Any) -> bool:
    if kind_of(kind) == "module":
        return False
    bases = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return issubclass(kind, _FOLLOWED) or not bases.isdisjoint(_PACKAGES) or "lr_scheduler" in kind.__module__


@functools.lru_cache(4096)
def _is_of_user(kind: Any) -> bool:
    """Tell whether a class is the user's own, and one whose objects hold nothing of the framework."""
    return bool(own_classes(kind)) and not _HOLDERS.isdisjoint(base.__name__ for base in kind.__mro__)


class _Keys(dict[str, str]):
    """The keys in a view of the attributes of an object, by name, made when they are first asked for."""

    def __init__(self, label: str, held: dict[str, Any], entries: dict[str, tuple[dict[str, Any], str]]) -> None:
        super().__init__()
        self._label, self._held, self._entries = label, held, entries

    def __missing__(self, name: str) -> str:
        self[name] = key = f"{self._label}.{name}"
        self._entries[key] = self._held, name
        return key


def _view(places: Iterable[_Place]) -> Variables:
    """Return a view of some attributes of several objects."""
    entries: dict[str, tuple[dict[str, Any], str]] = {}
    keyed = [
        (held, len(held) if only_new else -1, names, _Keys(label, held, entries))
        for label, held, names, only_new in places
    ]

    def read(key: str) -> Any:
        held, name = entries[key]
        return held[name]

    def write(key: str, value: Any) -> None:
        held, name = entries[key]
        held[name] = value

    def delete(key: str) -> None:
        held, name = entries[key]
        del held[name]

    def copy() -> dict[str, Any]:
        return {
            keys[name]: held[name]
            for held, size, names, keys in keyed
            if len(held) != size
            for name in names & held.keys()
        }

    return Variables(copy, read, write, delete, copy)
