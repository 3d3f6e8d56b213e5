"""State check: the state after a step must not depend on the records that the step saw (guarantee I2).

State that a checkpoint holds is compared directly. Other state (lists, running means, objects of the user's) is judged
by its effect on the gradient of a third record, in a step after each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import dense_parts_of
from lightning_dp.per_sample.frozen_randomness import UnfrozenDrawError
from lightning_dp.step import made_records
from lightning_dp.step.kept_tensors import same_values
from lightning_dp.step.local import address_of, local_part
from lightning_dp.step.optimizer_states import OptimizerStates
from lightning_dp.step.snapshot import few_values
from lightning_dp.system.torch_private import num_changes, saved_buffers

#: Relative difference of two gradients of one record that counts as rounding.
ROUNDING = 1e-6
_PLACES = 64  # values of each tensor in the state of an optimizer that are compared
#: Values of a record that is unlike all others: the means of a few ordinary ones may be on one side of a threshold.
_EXTREMES = (1e6, 0.0, -1e6)

_NUMBERS = frozenset((bool, int, float))  # asked first, because ``isinstance`` is a call

LATER = 4
"""Steps that follow a batch in a check: what the batch has left may show its effect in one of them."""

Gradients = dict[str, Tensor]
After = tuple[dict[str, Any], Gradients]
"""The state after a run, and the gradients of the run."""
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
    copied: Callable[[Tensor], Tensor] = (lambda value: value.detach().clone()) if whole else _few
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
                    state[f"optimizer {number}, state[{index}][{name!r}]"] = _few(value)
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


def _few(value: Any) -> Any:
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


def kept(gradients: Gradients, number: int) -> Gradients:
    """Return the gradients of a run, by its number, that are compared: none of the first, a few values of late ones."""
    return {name: _few(each) if number > 1 else each for name, each in gradients.items()} if number else {}


def check_state(
    run: Callable[[list[list[Any]]], list[After]],
    records: list[Any],
    *,
    together: bool,
    copies: int = 1,
    anywhere: Callable[[bool], bool] = bool,
    real: Sequence[list[Any]] = (),
    later: int = LATER,
) -> None:
    """Check that the state after a step depends neither on the records of the step nor on their number.

    Args:
        run: runs the step on one list of records after the other, under the same randomness and without lasting
            effect; returns the state after each list, and the gradients of each but the first.
        records: three records of the training set.
        together: whether a step may see several records at once.
        copies: number of copies that ``run`` makes of a single record; the test of another number uses more records.
        anywhere: tells whether a flag is set on any of the processes that run this check together.
        real: records of batches that have written something in a step; few other records may do so.
        later: runs of the third record that follow on a run of the second one. If they are fewer than ``LATER``, in a
            repeated check, there is one record of extreme values in place of three.

    Raises:
        PrivacyError: the state depends on them; the message names the state, or says that a later gradient changes.
    """
    first, second, third = records
    reference = run([[first], *[[third]] * later])
    more = [first] * copies + [second]
    others = [([second], "another record")]
    if together:
        others.append((more, f"{len(more)} records instead of {copies}"))
    others += [(batch, "the records of a batch") for batch in real]
    num_real = len(others)
    extremes = made_records.extremes(first, _EXTREMES[: None if later == LATER else 1])
    others += [([made], "a record of extreme values") for made in extremes]
    for number, (other, what) in enumerate(others):
        try:
            found = run([other, *[[third]] * (1 if number else later)])
        except (PrivacyError, UnfrozenDrawError):
            raise
        except Exception:
            if number < num_real:
                raise
            continue  # the user's code refuses such a record
        for place, (state, _) in enumerate(found):
            names = list(changed(reference[place][0], state))
            if anywhere(any(not isinstance(state.get(name), Tensor) for name in names)):
                again = run([[first], *[[third]] * place])  # shows the clock, say, and counts that go on
                moving = set(changed(reference[place][0], again[place][0]))
                names = [name for name in names if name not in moving or isinstance(state.get(name), Tensor)]
            if not anywhere(bool(names)):
                continue
            raise PrivacyError(
                f"training_step leaves {_listed(names)} with another value after {what}. Such state is saved, or "
                "read by other samples and later steps, without noise. Compute it on public data before fit, make it "
                "follow the weights alone, or leave it out (check_per_sample=False accepts it, outside the guarantee)."
            )
        if anywhere(not all(_same_gradients(one, two) for (_, one), (_, two) in zip(reference, found, strict=False))):
            raise PrivacyError(
                f"The gradient of a record changes with what training_step saw before: it differs after {what}. Some "
                "object keeps values of earlier records (a queue, a running mean, a cache) and a later loss reads "
                "them without noise, or a random generator of the module goes on by the number of records. Leave it "
                "out, compute it on public data before fit, or draw from the global generators."
            )


def _same_gradients(left: Gradients, right: Gradients) -> bool:
    if left.keys() != right.keys():
        return False
    pairs = [(left[name].double(), right[name].double()) for name in left]
    size = sum(float(one.nan_to_num().square().sum()) for one, _ in pairs) ** 0.5
    for one, other in pairs:
        if not torch.equal(one.isfinite(), other.isfinite()):
            return False
        distance = float((one - other).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).norm())
        if not distance <= 10 * ROUNDING * size:
            return False
    return True


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3]) or "state of another rank"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
