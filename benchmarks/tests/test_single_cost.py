"""The overhead of single samples: steps and plain passes of the same samples, in turn."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import single_cost


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 1), list[tuple[int, ...]]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(part.shape[0] for part in batch))
        return self.layer(batch[0]).square().mean()


def test_plain_pass_runs_samples_alone_and_leaves_no_gradient() -> None:
    module, singles = Module(), [[torch.randn(1, 2), torch.zeros(1)] for _ in range(3)]
    assert single_cost.plain_pass(module, singles) > 0
    assert module.seen == [(1, 1)] * 3
    assert all(parameter.grad is None for parameter in module.parameters())


def test_timer_reports_the_fastest_step_and_plain_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of 5 and 3 seconds; plain passes of 2 and 1."""
    now = iter([1.0, 6.0, 6.0, 9.0, 9.0])
    passes = iter([2.0, 1.0])
    monkeypatch.setattr(single_cost.time, "process_time", lambda: next(now))
    monkeypatch.setattr(single_cost, "plain_pass", lambda module, singles: next(passes))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    timer, batch = single_cost.Timer(2), [torch.zeros(single_cost.SAMPLES, 2), torch.zeros(single_cost.SAMPLES)]
    for _ in range(3):
        timer.begins(Module(), batch)
    assert json.loads(capsys.readouterr().out.removeprefix("took:")) == [3.0, 1.0]
    assert timer.steps == []
