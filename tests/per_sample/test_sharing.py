"""Equal functions of parameters share a node; others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.checks import assert_engine_agrees, make_engine


class Scale(nn.Module):
    """Weights that multiply the columns of an input ``(B, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w * self.v).sum(1)


def _made(compute: Callable[[Scale, int], Any], *, batches: int = 2) -> list[Any]:
    """Two functions of parameters, computed one after the other in the last of some batches."""
    module, x = Scale(), torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    engine = make_engine(module, module, x)
    for _ in range(batches):
        engine.begin(4)
        made = [compute(module, number) for number in (0, 1)]
    return made


def _written(module: Scale, number: int) -> Tensor:
    if number:
        with torch.no_grad():
            module.w.mul_(-1.0)
    return module.w.square()


def _replaced(module: Scale, number: int) -> Tensor:
    if number:
        module.w.data = -module.w.data
    return module.w.square()


def _in_place(module: Scale, number: int) -> Tensor:
    return (module.w * 2).mul_(1.0 + number) if number else module.w * 2


ALIKE: dict[str, Callable[[Scale, int], Any]] = {
    "one argument": lambda m, _: F.softplus(m.w),
    "numbers": lambda m, _: m.w**3,
    "two parameters": lambda m, _: m.w * m.v,
    "chain": lambda m, _: m.w.exp() * m.v + 1.0,
    "view": lambda m, _: m.w[1:].exp(),
}
UNLIKE: dict[str, Callable[[Scale, int], Any]] = {
    "other parameter of equal values": lambda m, i: (m.v if i else m.w).exp(),
    "other number": lambda m, i: m.w ** (2 + i),
    "other side": lambda m, i: torch.pow(2, m.w) if i else torch.pow(m.w, 2),
    "other view": lambda m, i: m.w[i : i + 2].exp(),
    "changed in place": _in_place,
    "parameter written": _written,
    "parameter replaced": _replaced,
    "random": lambda m, _: F.dropout(m.w, 0.5) * 2.0,
}


@pytest.mark.parametrize("how", list(ALIKE))
def test_equal_functions_share_a_node(how: str) -> None:
    first, second = _made(ALIKE[how])
    assert first.node is second.node


@pytest.mark.parametrize("how", list(UNLIKE))
def test_other_functions_have_nodes_of_their_own(how: str) -> None:
    first, second = _made(UNLIKE[how], batches=3)
    assert first.node.key != second.node.key


def test_functions_of_two_batches_share_nothing() -> None:
    module, x = Scale(), torch.randn(6, 3, dtype=torch.float64)
    engine = make_engine(module, module, x)
    nodes = []
    for _ in range(3):
        engine.begin(4)
        nodes += [module.w.exp().node for _ in range(2)]
    assert nodes[4] is nodes[5]
    assert len({*nodes[3:]}) == 2


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_loop_over_time_agrees_with_batches_of_one(memory: str) -> None:
    module = Scale()

    def loss(x: Tensor) -> Tensor:
        state = x
        for _ in range(4):
            gain = F.softplus(module.w)
            state = state * gain + F.linear(x, torch.diag(gain * module.v)) - gain * module.v
        return state.square().sum(1)

    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    engine = assert_engine_agrees(module, loss, x, memory=memory)
    engine.begin(5)
    loss(x[:5]).sum().backward()
    copied = [node for source in engine._tracker.sources.values() for node in source.nodes.values()]
    assert len(copied) == 2 + 4  # ``diag`` is not compared
