"""Series of pieces in one sandbox."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lightning_dp.sandbox.sandbox import Sandbox, StepGuard
from tests.sandbox.test_sandbox import Bench, bench

__all__ = ["bench"]


def test_pieces_of_a_series_begin_alike(bench: Bench) -> None:
    """Each piece begins from the same state and without gradients; the end puts everything back exactly."""
    before, starts = bench.picture(), []
    with bench.sandbox.series() as piece:
        for _ in range(3):
            with piece():
                assert all(parameter.grad is None for parameter in bench.module.parameters())
                starts.append(bench.picture()[0])
                bench.module.use_everything()
                for parameter in bench.module.parameters():
                    parameter.grad = torch.ones_like(parameter)
    assert starts == [before[0]] * 3
    assert bench.picture() == before


class Growing(nn.Module):
    """Adds to a tensor that is too large to be compared whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.sums = nn.Linear(1, 1), torch.zeros(2**16)


def test_series_compares_quickly_between_its_pieces() -> None:
    """One element written through ``data`` outlives a piece, and is gone when the series ends."""
    module = Growing()
    guard = StepGuard(lambda optimizer: True)
    sandbox = Sandbox(module, guard, list, lambda: warnings.catch_warnings())

    def add(sums: Tensor) -> None:
        sums.data[500] += 1

    with sandbox.series() as piece:
        with piece():
            add(module.sums)
        assert int(module.sums.sum()) == 1
    assert int(module.sums.sum()) == 0
    with sandbox.enter():
        add(module.sums)
    assert int(module.sums.sum()) == 0
