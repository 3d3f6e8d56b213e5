"""The tensors that optimizers keep between steps, such as momenta: what is written to them, apart from their values."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_dp.sandbox.refilling import refill_mapping, same_content
from lightning_dp.system.torch_private import changes_of, tensors_among


class OptimizerStates:
    """A look at the states of optimizers.

    Args:
        others: optimizers, and objects without such a state.
        last: an earlier look; what is unchanged is taken over from it.
    """

    def __init__(self, others: Iterable[Any], last: OptimizerStates | None = None) -> None:
        self._states: list[Any] = []  # an optimizer, and its state
        self._groups: list[Any] = []  # of an optimizer, and which they are
        held: list[dict[Any, Any]] = []
        for one in others:
            state, groups = getattr(one, "state", None), getattr(one, "param_groups", None)
            if isinstance(groups, list):
                self._groups.append((groups, groups.copy()))
            if isinstance(state, dict) and groups is not None:
                self._states.append((one, state))
                held += [state, *[part for part in state.values() if type(part) is dict or isinstance(part, dict)]]
        self.content = held, [*chain.from_iterable(held)], [*chain.from_iterable(map(dict.values, held))]
        """Dictionaries of all states, with their keys and their values."""
        if last is not None and all(map(same_content, self.content, last.content)):
            self.held: list[Any] = last.held  # with copies
            self.tensors: list[Tensor] = last.tensors
        else:
            self.held = [(part, part.copy()) for part in held]
            self.tensors = tensors_among(self.content[-1])
        self.changes = changes_of(self.tensors)

    def writes_until(self, after: OptimizerStates) -> Iterator[tuple[Any, ...]]:
        """Yield a key if tensors were replaced until a later look, or how often each was changed in place."""
        if not same_content(self.tensors, after.tensors):
            same = [*map(operator.is_, self.tensors, after.tensors)]
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
        """Give optimizers the groups and tensors back that they held, but no values of tensors."""
        for groups, before in self._groups:
            if not same_content(groups, before):
                groups[:] = before
        for one, state in self._states:
            if one.state is not state:
                one.state = state
        for held, before in self.held:
            if not same_content(held, before):
                refill_mapping(held, before)
