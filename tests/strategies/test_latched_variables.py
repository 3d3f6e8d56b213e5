"""Variables that a step sets once, when certain records come: those of Python modules, functions and classes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import PrivacyError
from lightning_dp.loop import make_private
from tests.strategies.test_latched_state import RARE, REFUSED, STEPS, Module, loader, steps_of_fit

FACTOR = 1.0
OPTIONS: dict[str, float] = {}
SEEN: list[int] = []


class Latches(Module):
    """Sets a variable at a rare word, or at the fifth run."""

    factor_of_class = 1.0

    def __init__(self, *, by_count: bool) -> None:
        super().__init__()
        self.by_count = by_count

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.read()
        if self.num == 5 if self.by_count else (batch[0] == RARE).any():
            self.write()
        return loss

    def read(self) -> float:
        raise NotImplementedError

    def write(self) -> None:
        raise NotImplementedError


class GlobalNumber(Latches):
    def read(self) -> float:
        return FACTOR

    def write(self) -> None:
        global FACTOR
        FACTOR = 0.5


def _latch() -> None:
    OPTIONS["seen"] = 0.5


class GlobalOptions(Latches):
    def read(self) -> float:
        return OPTIONS.get("seen", 1.0)

    def write(self) -> None:
        _latch()


class GlobalList(Latches):
    def read(self) -> float:
        return 0.5 if SEEN else 1.0

    def write(self) -> None:
        SEEN.append(1)


class OfItsClass(Latches):
    def read(self) -> float:
        return self.factor_of_class

    def write(self) -> None:
        type(self).factor_of_class = 0.5


class OfABase(Latches):
    def read(self) -> float:
        return self.factor_of_class

    def write(self) -> None:
        Latches.factor_of_class = 0.5


def enclosed(**options: Any) -> Any:
    factor = 1.0

    class Enclosed(Latches):
        def read(self) -> float:
            return factor

        def write(self) -> None:
            nonlocal factor
            factor = 0.5

    return Enclosed(**options)


def enclosed_options(**options: Any) -> Any:
    kept: dict[str, float] = {}

    class Enclosed(Latches):
        def read(self) -> float:
            return kept.get("seen", 1.0)

        def write(self) -> None:
            kept["seen"] = 0.5

    return Enclosed(**options)


def attribute_of_a_function(**options: Any) -> Any:
    def factor() -> float:
        return getattr(factor, "seen", 1.0)

    class Enclosed(Latches):
        def read(self) -> float:
            return factor()

        def write(self) -> None:
            factor.seen = 0.5  # type: ignore[attr-defined]

    return Enclosed(**options)


class Gate(nn.Module):
    def forward(self, loss: Tensor, is_set: bool) -> Tensor:
        global FACTOR
        loss = loss * FACTOR
        if is_set:
            FACTOR = 0.5
        return loss


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, is_set: bool) -> Tensor:
        global FACTOR
        ctx.factor = FACTOR
        if is_set:
            FACTOR = 0.5
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.factor, None


class Through(nn.Module):
    def forward(self, loss: Tensor, is_set: bool) -> Any:
        return Gated.apply(loss, is_set)  # type: ignore[no-untyped-call]


class Same(nn.Module):
    def forward(self, loss: Tensor, is_set: bool) -> Tensor:
        return loss


def gated_by_a_hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    global FACTOR
    output = output * FACTOR
    if args[1]:
        FACTOR = 0.5
    return output


class InALayer(Latches):
    """Sets a variable in a function that no step names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate: nn.Module = Gate()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = Module.training_step(self, batch, batch_idx)
        return self.gate(loss, self.num == 5 if self.by_count else bool((batch[0] == RARE).any()))  # type: ignore[no-any-return]

    def read(self) -> float:
        return FACTOR


class InAFunction(InALayer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = Through()


class InAHook(InALayer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = Same()
        self.gate.register_forward_hook(gated_by_a_hook)


class Keeper:
    def read(self) -> float:
        return FACTOR

    def halve(self) -> None:
        global FACTOR
        FACTOR = 0.5


KEEPER = Keeper()


class ByAnObject(Latches):
    def read(self) -> float:
        return KEEPER.read()

    def write(self) -> None:
        KEEPER.halve()


class ByATransfer(InALayer):
    """Reads a variable that no function sets that its step names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = Same()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return Module.training_step(self, batch, batch_idx) * self.read()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if self.num == 5 if self.by_count else (batch[0] == RARE).any():
            vars(sys.modules[__name__])["FACTOR"] = 0.5
        return super().transfer_batch_to_device(batch, device, dataloader_idx)


OUTSIDE = [InALayer, InAFunction, InAHook, ByAnObject, ByATransfer]
ENCLOSED = [enclosed, enclosed_options, attribute_of_a_function]
VARIABLES = [GlobalNumber, GlobalOptions, GlobalList, OfItsClass, OfABase, *ENCLOSED, *OUTSIDE]


@pytest.fixture(autouse=True)
def _reset() -> Any:
    global FACTOR
    FACTOR, Latches.factor_of_class, OfItsClass.factor_of_class = 1.0, 1.0, 1.0
    OPTIONS.clear(), SEEN.clear()


@pytest.mark.parametrize("make", VARIABLES)
@pytest.mark.one_in(5)
def test_a_variable_that_a_rare_record_sets_is_refused(make: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, make(by_count=False))


@pytest.mark.parametrize("make", VARIABLES)
@pytest.mark.one_in(8)
def test_a_variable_that_is_set_by_counts_is_free(make: Any, tmp_path: Any) -> None:
    module = make(by_count=True)
    assert steps_of_fit(tmp_path, module) == STEPS
    assert module.read() == 0.5


def test_a_variable_that_a_layer_sets_in_a_loop_is_refused() -> None:
    module = InALayer(by_count=False)
    optimizer, options = torch.optim.SGD(module.parameters(), lr=0.1), {"noise_multiplier": 1.0, "target_delta": 1e-3}
    private = make_private(
        module, optimizer, loader(), lambda model, batch: model.training_step(batch, 0), steps=STEPS, **options
    )

    def train() -> None:
        for batch in (batch for _ in range(STEPS) for batch in private.loader):
            private.step(batch)

    with private, pytest.raises(PrivacyError, match=REFUSED):
        train()


CALLS = 0


class Counts(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        global CALLS
        CALLS += 1
        SEEN.append(CALLS)
        return super().training_step(batch, batch_idx) / CALLS


def test_globals_hold_real_steps_alone(tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, Counts(), steps=12) == 12
    assert [*range(1, 13)] == SEEN
