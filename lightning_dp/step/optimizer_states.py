"""The tensors that optimizers keep between steps, such as momenta: what is written to them, apart from their values."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_dp.system.torch_private import changes_of


class OptimizerStates:
    """A look at the states of optimizers.

    Args:
        others: optimizers, and objects without such a state.
    """

    def __init__(self, others: Iterable[Any]) -> None:
        self._states: list[Any] = []  # an optimizer, its state, and a copy
        self._parts: list[Any] = []  # the state of a parameter, and a copy
        for one in others:
            state = getattr(one, "state", None)
            if isinstance(state, dict) and hasattr(one, "param_groups"):
                self._states.append((one, state, state.copy()))
                self._parts += [(held, held.copy()) for held in state.values() if isinstance(held, dict)]
        values = [*chain.from_iterable([held.values() for held, _ in self._parts])]
        kinds = {kind for kind in set(map(type, values)) if issubclass(kind, Tensor)}
        self.tensors = [value for value in values if type(value) in kinds]
        self.changes = changes_of(self.tensors)

    def writes_until(self, after: OptimizerStates) -> Iterator[tuple[Any, ...]]:
        """Yield a key if tensors were replaced until a later look, or how often each was changed in place."""
        same = [*map(operator.is_, self.tensors, after.tensors)]
        if len(self.tensors) != len(after.tensors) or not all(same):
            yield "states", len(after.tensors) - len(self.tensors), same.count(False)
        else:
            changes = tuple(map(operator.sub, after.changes, self.changes))
            if any(changes):
                yield "states", changes

    def numbers_until(self, after: OptimizerStates) -> dict[str, int]:
        """Return the number of changes of each tensor until a later look, by name; -1 if it was replaced."""
        rows = zip(self.tensors, after.tensors, self.changes, after.changes, strict=False)
        numbers = {
            f"number of writes to state {index} of the optimizers": now - then if one is other else -1
            for index, (one, other, then, now) in enumerate(rows)
        }
        return {**numbers, "number of states of the optimizers": len(after.tensors)}

    def put_back(self) -> None:
        """Give optimizers the tensors back that they held, but no values of tensors."""
        for one, state, before in self._states:
            if one.state is not state:
                one.state = state
            if len(state) != len(before) or not all(map(operator.is_, state.values(), before.values())):
                state.clear()
                state.update(before)
        for held, before in self._parts:
            if len(held) != len(before) or not all(map(operator.is_, held.values(), before.values())):
                held.clear()
                held.update(before)
