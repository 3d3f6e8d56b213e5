"""Looks at what user code may write: tensors, states of optimizers, attributes, modes, rates, and what trains."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.sandbox.contents import Contents
from lightning_dp.sandbox.object_kinds import own_classes
from lightning_dp.sandbox.optimizer_states import OptimizerStates
from lightning_dp.sandbox.refilling import (
    plain_of,
    refill_mapping,
    replace_plain,
    reset_attributes,
    same_content,
)
from lightning_dp.sandbox.saved_state import Numbers, changed, held_numbers, put_numbers, scheduled_rates
from lightning_dp.sandbox.snapshot import NOT_PLAIN
from lightning_dp.sandbox.variables import Variables
from lightning_dp.system.local import addresses_of
from lightning_dp.system.torch_private import NUM_REGISTRIES, Layers, changes_of

_NONE: dict[int, Any] = {}
_WITHOUT_NUMBERS = {Variables, dict}
"""Types among optimizers and schedulers whose numbers the contents show."""
_MOST_STEPS = 4
"""Steps of a count, or values of a flag or word, that count as different ones."""
_MOST_KNOWN = 1_000
"""Patterns of changes of all tensors that are remembered; an optimizer's step makes the same one each time."""
_FEW = 4
"""Changed tensors up to which a known pattern is reported again."""


class Look:
    """A look at a module, and at numbers of optimizers and schedulers.

    Values of tensors are not read, so a write through ``.data`` into the same memory is not seen. What attributes and
    variables lead to is looked into, see ``Contents``.

    Args:
        layers: of the user's module.
        others: optimizers and schedulers.
        more: attributes of other objects, and variables.
        last: an earlier look, which makes this one cheaper.
    """

    def __init__(self, layers: Layers, others: list[Any], more: Sequence[Any] = (), last: Look | None = None) -> None:
        others = [one for one in others if type(one) not in _WITHOUT_NUMBERS]
        self._source, self._others, self._more = layers, others, more
        layers = layers.now()
        self.layers, self._kinds = layers.all, [*map(type, layers.all)]
        self._registries = layers.registries()
        # a step may register hooks, with an attribute that says so
        self._registered = [{**each} if each else _NONE for each in self._registries]
        with unfollowed():  # followed parameters would report each question
            self.tensors = [*layers.parameters(), *(buffers := layers.buffers())]
            self.changes = [changes_of(self.tensors), addresses_of(self.tensors)]
            self.trains = [tensor.requires_grad for tensor in self.tensors]
        kinds: Any = dict.fromkeys(layer.__class__ for layer in layers.own)
        kinds = dict.fromkeys(each for kind in kinds for each in own_classes(kind))
        self._attributes = [*map(vars, layers.own), *(Variables.of_class(kind) for kind in kinds), *more]
        self._plain = layers.plain
        counts = self.changes[0][len(self.tensors) - len(buffers) :]
        self.contents: Contents = Contents(self._attributes, buffers, counts, None if last is None else last.contents)
        """Contents of the attributes, and of what they hold."""
        self.held = self.contents.given
        self.modes = [layer.training for layer in layers.all]
        self.numbers, self.rates = held_numbers(others), scheduled_rates(others)
        with unfollowed():
            self.states: OptimizerStates = OptimizerStates(others, None if last is None else last.states)

    def writes_until(self, after: Look, known: set[Any]) -> Iterator[tuple[Any, ...]]:
        """Yield a key for each write until a later look, the same one for a write of the same kind.

        Args:
            after: the later look.
            known: numbers of changes of all tensors whose keys have been yielded, and are not yielded again unless
                they are few.
        """
        same = [*map(operator.is_, self.tensors, after.tensors)]
        (counts, places), (counts_after, places_after) = self.changes, after.changes
        changes = tuple(map(operator.sub, counts_after, counts))
        is_known = changes in known and len(changes) - changes.count(0) > _FEW
        if not all(same) or places != places_after or (any(changes) and not is_known):
            if all(same) and places == places_after and len(known) < _MOST_KNOWN:
                known.add(changes)
            rows = zip(same, *self.changes, *after.changes, strict=False)
            for index, (is_same, before, old, now, new) in enumerate(rows):
                if not is_same or now != before or old != new:
                    counted = self.contents.count_in(self.tensors[index]), after.contents.count_in(after.tensors[index])
                    step = step_of(("tensor", index), *counted, known)
                    yield "tensor", index, is_same, now - before, old == new, *step
        if len(after.tensors) != len(self.tensors):
            yield "number of tensors", len(after.tensors) - len(self.tensors)
        if self.layers is not after.layers:  # an attribute of a layer is new, or a layer is
            if len(after.layers) != len(self.layers):
                yield "number of layers", len(after.layers) - len(self.layers)
            pairs = enumerate(zip(self.layers, after.layers, strict=False))
            yield from (("layer", index) for index, (one, other) in pairs if one is not other)
        for key, one, other in self.contents.writes_until(after.contents):
            yield *key, *step_of(key, one, other, known)
        for kind, flags, later in (("mode", self.modes, after.modes), ("trains", self.trains, after.trains)):
            if flags != later:
                yield from (
                    (kind, index, now)
                    for index, (then, now) in enumerate(zip(flags, later, strict=False))
                    if then != now
                )
        if self.numbers != after.numbers:
            ours, others = _joined(self.numbers), _joined(after.numbers)
            for name in changed(ours, others):
                value = others.get(name)  # a rate that user code sets is not the one of its scheduler
                scheduled = ("scheduled",) if value in after.rates else ()
                yield "number", name, *scheduled, *step_of(("number", name), ours.get(name), value, known)
        yield from self.states.writes_until(after.states)

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Give module and optimizers, within the context, what they held at this look, but no values of parameters, nor
        of large tensors.
        """
        now, taken = Look(self._source, self._others, self._more), self._take_new()
        self.put_back()
        try:
            with self.contents.back_in():
                yield
        finally:
            now.put_back()
            _give_back(taken)

    @contextmanager
    def numbers_back_in(self) -> Iterator[None]:
        """Give attributes and variables, within the context, the numbers and words that they held at this look, also in
        containers and small tensors.
        """
        registered, pairs = [{**each} for each in self._registries], zip(self._attributes, self.held, strict=True)
        taken = self._take_new()
        undone = [replace_plain(attributes, plain_of(held), held) for attributes, held in pairs]
        self._register(self._registered)
        try:
            with self.contents.back_in():
                yield
        finally:
            for undo in reversed(undone):
                undo()
            self._register(registered)
            _give_back(taken)

    def _register(self, registered: list[dict[Any, Any]]) -> None:
        # torch takes the parametrized weight away from a class that a layer no longer has
        keeps = [type(layer) is kind for layer, kind in zip(self.layers, self._kinds, strict=True)]
        for number, (each, before) in enumerate(zip(self._registries, registered, strict=True)):
            is_fixed = not isinstance(each, dict)  # as of scripted layers
            if keeps[number // NUM_REGISTRIES] and not is_fixed and not same_content(each, before):
                refill_mapping(each, before)

    def _take_new(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Take the attributes away that layers of torch did not have at this look, and return them."""
        return [
            (vars(layer), name, vars(layer).pop(name))
            for layer, names in self._plain
            for name in (vars(layer).keys() - names if len(vars(layer)) != len(names) else ())
        ]

    def put_back(self) -> None:
        """Give module and optimizers for good what :meth:`back_in` gives within a context, but for contents."""
        self._register(self._registered)
        self._take_new()
        for attributes, before in zip(self._attributes, self.held, strict=True):
            reset_attributes(
                attributes, {name: each for name, each in before.items() if name not in NOT_PLAIN}, NOT_PLAIN
            )
        for layer, training in zip(self.layers, self.modes, strict=True):
            layer.training = training
        with unfollowed():
            for tensor, trains in zip(self.tensors, self.trains, strict=True):
                if tensor.requires_grad != trains and tensor.is_leaf:
                    tensor.requires_grad_(trains)
            self.states.put_back()
        put_numbers(self._others, self.numbers)


def step_of(key: tuple[Any, ...], before: Any, after: Any, known: set[Any]) -> tuple[Any, ...]:
    """Return how far a count has gone, or another value of a flag or word, the first few times; else nothing.

    A record may change something that counts change too, but hardly by as much.
    """
    kind = type(after)
    if kind not in (int, bool, str):
        return ()
    step = after - before if kind is int and type(before) is int else after
    places = [("step", num, *key) for num in range(_MOST_STEPS)]
    if (*places[0], step) in known:
        return (step,)
    free = next((place for place in places if place not in known), None)
    if free is None:
        return ()
    known |= {free, (*places[0], step)}
    return (step,)


def _give_back(taken: list[tuple[dict[str, Any], str, Any]]) -> None:
    for attributes, name, value in taken:
        attributes[name] = value


def _joined(numbers: Numbers) -> dict[Any, Any]:
    return {(part, name): value for part, held in numbers.items() for name, value in held.items()}
