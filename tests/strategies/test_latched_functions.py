"""Variables of functions that a step reaches through objects, containers and partial functions, which a rare record
sets.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import PrivacyError
from lightning_dp.loop import make_private
from lightning_dp.sandbox.held_functions import functions_in
from tests.strategies.test_latched_state import RARE, REFUSED, STEPS, Module, loader, steps_of_fit

Loss = Callable[[Tensor, Tensor], Tensor]


def latch(*, by_count: bool = False) -> Loss:
    """A loss whose factor a rare record, or the fifth real run, sets."""
    factor, num = 1.0, 0

    def loss_of(loss: Tensor, words: Tensor) -> Tensor:
        nonlocal factor, num
        loss, num = loss * factor, num + 1
        if num == 5 if by_count else (words == RARE).any():
            factor = 0.5
        return loss

    return loss_of


class Holder:
    """An object with a loss.

    Args:
        function: the loss.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class Slotted(Holder):
    __slots__ = ("function",)


class Layer(nn.Module):
    """A layer with functions in a list."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.functions = [function]

    def forward(self, *args: Any) -> Any:
        return self.functions[0](*args)


def first(functions: Any, *args: Any) -> Any:
    return functions["first"](*args)


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "object": Holder,
    "slots": Slotted,
    "layer": Layer,
    "partial": functools.partial,
    "argument": lambda function: functools.partial(first, {"first": function}),
    "method": lambda function: Holder(function).__call__,
    "enclosing": lambda function: (lambda held: lambda *args: held(*args))(Holder(function)),
}


class Latched(Module):
    def __init__(self, hold: Callable[[Any], Any], **options: bool) -> None:
        super().__init__()
        self.held = hold(latch(**options))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.held(super().training_step(batch, batch_idx), batch[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.one_in(4)
def test_a_held_function_that_a_rare_record_sets_is_refused(name: str, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Latched(HOLDERS[name]))


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.one_in(7)
def test_a_held_function_that_counts_real_steps_is_free(name: str, tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, Latched(HOLDERS[name], by_count=True)) == STEPS


def with_options(options: dict[str, float], model: Any, batch: Any) -> Tensor:
    loss: Tensor = Module.training_step(model, batch, 0) * options["factor"]
    if (batch[0] == RARE).any():
        options["factor"] = 0.5
    return loss


def of_batch(held: Any, model: Any, batch: Any) -> Any:
    return held(Module.training_step(model, batch, 0), batch[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: functools.partial(with_options, {"factor": 1.0}),
        lambda: functools.partial(of_batch, Holder(latch())),
        lambda: Holder(functools.partial(of_batch, latch())),
    ],
)
@pytest.mark.one_in(3)
def test_a_loss_of_a_loop_that_a_rare_record_sets_is_refused(make: Any) -> None:
    module = Module()
    optimizer, options = torch.optim.SGD(module.parameters(), lr=0.1), {"noise_multiplier": 1.0, "target_delta": 1e-3}
    private = make_private(module, optimizer, loader(), make(), steps=STEPS, **options)
    batches = (batch for _ in range(STEPS) for batch in private.loader)
    with private, pytest.raises(PrivacyError, match=REFUSED):
        deque(map(private.step, batches), maxlen=0)


def test_functions_are_found_once_and_not_without_end() -> None:
    function = latch()
    ring: list[Any] = [function, Holder(function)]
    ring.append(ring)
    assert functions_in(ring) == [function]
    assert len(functions_in([latch() for _ in range(1_000)])) < 300


def test_functions_without_a_module_are_the_users(tmp_path: Any) -> None:
    """As those that scipy makes by ``exec``, which layers of speechbrain hold."""
    made: dict[str, Any] = {"__name__": None}
    exec("def loss_of(loss, words): return loss / 2", made)
    assert made["loss_of"].__module__ is None
    assert steps_of_fit(tmp_path, Latched(lambda held: made["loss_of"])) == STEPS
    assert functions_in([made["loss_of"]]) == [made["loss_of"]]
