"""Looks at a module that show writes through ``.data``, and changes within containers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_dp.sandbox.close_looks import CloseLook, Eye
from tests.cases import each


def module() -> Any:
    made: Any = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(2, 2, 2), nn.Dropout())
    made[1].to(memory_format=torch.channels_last)
    made.seen, made.held = [1], torch.zeros(2)
    made.register_buffer("count", torch.zeros(()))
    made[0].weight.grad = torch.ones(2, 3)
    return made


def shift(tensor: torch.Tensor) -> None:
    """Exchange a tensor's rows for columns over the same memory."""
    tensor.data = tensor.data.view(tensor.shape[::-1]).t()


TENSORS: list[Callable[[Any], Any]] = [
    lambda made: made[0].weight.data.neg_(),
    lambda made: made[1].weight.data.neg_(),
    lambda made: made[0].weight.grad.data.neg_(),
    lambda made: made.count.add_(1),
    lambda made: setattr(made[0].weight, "data", made[0].weight.clone()),
    lambda made: shift(made[0].weight),
    lambda made: setattr(made[0].weight, "grad", None),
    lambda made: made[0].bias.requires_grad_(requires_grad=False),
]
OTHERS: list[Callable[[Any], Any]] = [
    lambda made: made.seen.append(2),
    lambda made: made.held.add_(1),
    lambda made: setattr(made[2], "p", 0.25),
    lambda made: setattr(made[1], "padding", (1, 1)),
    lambda made: setattr(made, "new", 1),
    lambda made: setattr(made, "seen", [1]),
    lambda made: made.eval(),
    lambda made: setattr(made.rate, "lr", 2.0),
]


@each("change, of_tensors", [(c, True) for c in TENSORS] + [(c, False) for c in OTHERS])
def test_a_change_is_seen(change: Callable[[Any], Any], of_tensors: bool) -> None:
    made, owner = module(), SimpleNamespace(steps=0)
    rate = SimpleNamespace(lr=1.0)
    object.__setattr__(made, "rate", rate)
    eye = Eye(made)

    def look() -> CloseLook:
        return CloseLook(eye, [rate], owner, [], saves=False)

    before = look()
    owner.steps = 1  # an owner that saves nothing
    assert before.is_same(look(), set(), tensors_only=False)
    change(made)
    after = look()
    assert not before.is_same(after, set(), tensors_only=False)
    assert before.is_same(after, set(), tensors_only=True) != of_tensors


def test_what_an_owner_saves_is_seen() -> None:
    made, owner = module(), SimpleNamespace(best=[])
    eye = Eye(made)
    before = CloseLook(eye, [], owner, [], saves=True)
    owner.best.append(1.0)
    assert not before.is_same(CloseLook(eye, [], owner, [], saves=True), set(), tensors_only=False)


def test_a_hook_on_a_layer_is_no_change() -> None:
    made, owner = module(), SimpleNamespace()
    eye = Eye(made)
    before = CloseLook(eye, [], owner, [], saves=False)
    made[0].register_forward_hook(lambda *_: None)
    assert before.is_same(CloseLook(eye, [], owner, [], saves=False), set(), tensors_only=False)
