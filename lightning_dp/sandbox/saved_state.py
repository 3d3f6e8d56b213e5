"""The state that a checkpoint holds, by name: of a module, its optimizers and other objects, and what changed in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_dp.per_sample._torch import dense_parts_of
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.optimizer_states import OptimizerStates
from lightning_dp.sandbox.snapshot import few_values
from lightning_dp.system.local import address_of, local_part
from lightning_dp.system.torch_private import num_changes, saved_buffers

#: Relative difference of two values that counts as rounding.
ROUNDING = 1e-6
_PLACES = 64  # values of each tensor that are compared where few are enough
_NUMBERS = frozenset((bool, int, float))  # asked first, because ``isinstance`` is a call

Numbers = dict[tuple[int, int], dict[str, Any]]


class Changes(NamedTuple):
    """The changes in place of tensors until now.

    Args:
        by_name: ids and addresses of parameters and persistent buffers, and numbers of their changes, by name.
        states: of optimizers.
    """

    by_name: dict[str, tuple[tuple[int, int], int]]
    states: OptimizerStates


def changes_in(module: nn.Module, others: list[Any]) -> Changes:
    """Return the changes of a module, and of optimizers among other objects."""
    held = [*module.named_parameters(), *saved_buffers(module)]
    by_name = {name: ((id(tensor), address_of(tensor)), num_changes(tensor)) for name, tensor in held}
    return Changes(by_name, OptimizerStates(others))


def saved_state(
    module: nn.Module, others: list[Any], before: Changes | None = None, *, whole: bool = True
) -> dict[str, Any]:
    """Return copies of parameters, persistent buffers, and numeric settings of optimizers and schedulers; also what
    trains, and the mode of each layer.

    Args:
        module: the user's.
        others: optimizers and schedulers.
        before: result of ``changes_in`` earlier. The state then has the numbers of writes since: a write of the value
            that a tensor has anyway leaves nothing else.
        whole: whether to copy all values of parameters and buffers, or a few of each.
    """
    copied: Callable[[Tensor], Tensor] = (lambda value: value.detach().clone()) if whole else few_of
    state = {name: _copied(value) for name, value in numbers_of(others)}
    if before is not None:
        now = changes_in(module, others)
        for name, (key, number) in now.by_name.items():
            known, earlier = before.by_name.get(name, ((0, 0), 0))
            state[f"number of writes to {name}"] = number - earlier if known == key else -1
        state |= before.states.numbers_until(now.states)
    state |= {f"{name}.requires_grad": p.requires_grad for name, p in module.named_parameters()}
    state |= {f"{name}.training": layer.training for name, layer in module.named_modules()}
    state |= {name: copied(local_part(p)) for name, p in module.named_parameters()}
    state |= {name: copied(value) for name, value in saved_buffers(module)}
    extra = {name: value for name, value in module.state_dict().items() if name not in state}
    state |= {f"state_dict(){path}": _copied(value) for path, value in leaves_of(extra)}
    for number, other in enumerate(others):
        states = other.state if hasattr(other, "param_groups") else {}
        for index, held in enumerate(states.values()):
            for name, value in held.items() if isinstance(held, Mapping) else ():
                if isinstance(value, (bool, int, float, Tensor)):
                    state[f"optimizer {number}, state[{index}][{name!r}]"] = few_of(value)
    return state


def numbers_of(others: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of optimizers and schedulers, with names: learning rates, counters, the best figure so far."""
    for number, other in enumerate(others):
        for index, group in enumerate(getattr(other, "param_groups", ())):
            for name, value in group.items():
                if isinstance(value, (bool, int, float, Tensor)):
                    yield f"optimizer {number}, param_groups[{index}][{name!r}]", value
        held = {} if hasattr(other, "param_groups") else getattr(other, "__dict__", {})
        for name, value in held.items():
            if isinstance(value, (bool, int, float)):
                yield f"{type(other).__name__}.{name}", value


def held_numbers(others: list[Any]) -> Numbers:
    """Return the same numbers but for those in tensors, by the part of an object that holds them."""
    return {
        part: {
            name: value for name, value in held.items() if type(value) in _NUMBERS or isinstance(value, (int, float))
        }
        for part, held in parts_of(others).items()
    }


def put_numbers(others: list[Any], numbers: Numbers) -> None:
    """Give objects the numbers that they held, as ``held_numbers`` has returned them."""
    parts: dict[tuple[int, int], Any] = parts_of(others)
    for part, held in parts.items():
        for name, value in numbers.get(part, {}).items():
            if held.get(name) is value:
                continue
            if isinstance(held, dict):
                held[name] = value
            else:  # of a class that a loss function holds
                setattr(others[part[0]], name, value)


def scheduled_rates(others: list[Any]) -> list[float]:
    """Return the learning rates that schedulers have set last."""
    rates: list[float] = []
    for one in others:
        if hasattr(one, "get_last_lr"):
            try:
                rates += one.get_last_lr()
            except AttributeError:  # its own `step` keeps no record of them
                with suppress(Exception):
                    rates += one.get_lr()
    return rates


def parts_of(others: list[Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the parts of objects that hold numbers: the groups of an optimizer, or the attributes of another object,
    by its position and that of the group.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for number, other in enumerate(others):
        groups = getattr(other, "param_groups", None)
        for index, held in enumerate([getattr(other, "__dict__", {})] if groups is None else groups):
            found[number, index] = held
    return found


def leaves_of(saved: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values in something that a checkpoint holds, with their paths; objects are left out."""
    for path, leaf in tree_flatten_with_path(saved)[0]:
        value = torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf" else leaf
        if isinstance(value, (bool, int, float, str, Tensor)):
            yield keystr(path), local_part(value).detach() if isinstance(value, Tensor) else value


def few_of(value: Any) -> Any:
    """Return a few values of this process's part of a tensor, at fixed places; anything else unchanged."""
    return few_values(local_part(value), _PLACES) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names at which two states differ."""
    for name in dict.fromkeys([*first, *second]):
        left, right = first.get(name), second.get(name)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            if not same_values(left, right) and not _close(left, right):
                yield name
        elif left != right:
            yield name


def _close(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.layout != right.layout or not left.is_floating_point():
        return False
    *places, left = dense_parts_of(left)
    *others, right = dense_parts_of(right)
    if left.shape != right.shape or not all(map(same_values, places, others)):
        return False
    return torch.allclose(left.double(), right.double(), rtol=ROUNDING, atol=0.0, equal_nan=True)
