"""Watch of what user code writes: parameters, buffers, attributes, modes, rates, released gradients, what trains."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.step.state_check import Numbers, changed
from lightning_dp.system.torch_private import Layers, changes_of, num_changes

_MOST_KNOWN = 1_000
"""Patterns of changes of all tensors that are remembered; an optimizer's step makes the same one each time."""


class Look:
    """A look at a module, and at numbers of optimizers and schedulers.

    Values of tensors are not read, so a write through ``.data`` into the same memory is not seen. Nor is a change
    within a container.

    Args:
        layers: of the user's module.
        numbers: see ``held_numbers``.
    """

    def __init__(self, layers: Layers, numbers: Numbers) -> None:
        layers = layers.now()
        with unfollowed():  # followed parameters would report each question
            self._tensors = [*layers.parameters(), *layers.buffers()]
            self._changes = [changes_of(self._tensors), _addresses_of(self._tensors)]
            self._trains = [tensor.requires_grad for tensor in self._tensors]
        self._attributes = [vars(layer) for layer in layers.own]
        self._held = [[*map(id, held.values())] for held in self._attributes]
        self._modes = [layer.training for layer in layers.all]
        self._numbers = numbers

    def writes_until(self, after: Look, known: set[Any]) -> Iterator[tuple[Any, ...]]:
        """Yield a key for each write until a later look, the same one for a write of the same kind.

        Args:
            after: the later look.
            known: numbers of changes of all tensors whose keys have been yielded, and are not yielded again.
        """
        same = [*map(operator.is_, self._tensors, after._tensors)]
        (counts, places), (counts_after, places_after) = self._changes, after._changes
        changes = tuple(map(operator.sub, counts_after, counts))
        if not all(same) or places != places_after or (any(changes) and changes not in known):
            if all(same) and places == places_after and len(known) < _MOST_KNOWN:
                known.add(changes)
            rows = zip(same, *self._changes, *after._changes, strict=False)
            for index, (is_same, before, old, now, new) in enumerate(rows):
                if not is_same or now != before or old != new:
                    yield "tensor", index, is_same, now - before, old == new
        if len(after._tensors) != len(self._tensors):
            yield "number of tensors", len(after._tensors) - len(self._tensors)
        if self._held != after._held:
            for index, (ids, others, held) in enumerate(zip(self._held, after._held, after._attributes, strict=False)):
                pairs = zip(held, [*ids, *[None] * len(others)], others, strict=False)
                yield from (("attribute", index, name) for name, one, other in pairs if one != other)
        if self._modes != after._modes:
            yield ("modes",)
        if self._trains != after._trains:
            yield ("which tensors train",)
        if self._numbers != after._numbers:
            yield from (("number", name) for name in changed(_joined(self._numbers), _joined(after._numbers)))


class WriteWatch:
    """A watch of what is written within a forward, and from its end to the beginning of the next logical batch.

    Args:
        look: takes a look.
        see: is given the keys of writes, and whether they were made after a forward.
    """

    def __init__(self, look: Callable[[], Look], see: Callable[..., None]) -> None:
        self._look, self._see = look, see
        self._known: dict[bool, set[Any]] = {False: set(), True: set()}  # by whether after a forward
        self._begun: Look | None = None
        self._ended: Look | None = None  # after the last forward

    def begin(self) -> None:
        """Begin a logical batch."""
        self._begun = self._look()
        if self._ended is not None:
            self._see(self._ended.writes_until(self._begun, self._known[True]), between=True)

    def begin_forward(self) -> Look:
        """Return a look at the state before the user's forward, which begins now."""
        before, self._begun = self._begun or self._look(), None
        return before

    def end_forward(self, before: Look) -> None:
        """Read what the forward that ends now has written since a look."""
        self._ended = self._look()
        self._see(before.writes_until(self._ended, self._known[False]))

    def forget(self) -> None:
        """Forget all looks: a trial puts state back, which counts as a change of tensors."""
        self._begun = self._ended = None


class Gradients:
    """The private gradients of a release.

    Args:
        optimizer: it steps on them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with unfollowed():
            self._before = self._look()

    def _look(self) -> tuple[list[Any], list[int]]:
        grads = [each.grad for each in self._parameters]
        # all of one dtype are views of one buffer, and count its changes together
        return grads, [-1 if each is None else num_changes(each) for each in (*grads[:1], *grads[-1:])]

    def writes(self) -> Iterator[tuple[Any, ...]]:
        """Yield a key for gradients that were changed in place since, and for each that was replaced."""
        with unfollowed():
            grads, changes = self._look()
        before, counted = self._before
        for index, (one, other) in enumerate(zip(before, grads, strict=True)):
            if other is not None and one is not other:
                yield "another gradient", index
        yield from (("gradients", now - then) for then, now in zip(counted, changes, strict=True) if now > then)


def _joined(numbers: Numbers) -> dict[Any, Any]:
    return {(part, name): value for part, held in numbers.items() for name, value in held.items()}


def _addresses_of(tensors: list[Tensor]) -> tuple[int, ...]:
    try:
        return tuple([tensor.data_ptr() for tensor in tensors])
    except RuntimeError:  # sparse tensors and sharded ones have none
        return (0,) * len(tensors)
