"""Un-noised figures: their formulas over microbatches, and that they do not outlive their batch."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_dp.step.diagnostics import ClippingDiagnostics, Diagnostics

RAW = torch.tensor([3.0, 4.0])


def test_off_computes_nothing() -> None:
    diagnostics = Diagnostics()
    diagnostics.add(RAW, torch.ones(2), torch.ones(2))
    diagnostics.summarise(RAW, 1.0)
    assert vars(diagnostics) == {}


def test_figures_are_over_all_microbatches() -> None:
    diagnostics = ClippingDiagnostics()
    diagnostics.add(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0]))
    diagnostics.add(torch.tensor([0.0, 4.0]), torch.tensor([2.0, math.nan]), torch.tensor([2.0, 0.0]))
    diagnostics.summarise(torch.tensor([1.0, 0.0]), noise_std=0.5)
    figures = diagnostics.take()
    assert figures["clip_fraction"] == 0.5
    assert figures["clipping_bias"] == pytest.approx(0.6)
    assert figures["noise_to_signal"] == pytest.approx(0.5 * 2**0.5)


def test_figures_are_taken_once_and_never_carried_over() -> None:
    diagnostics = ClippingDiagnostics()
    diagnostics.add(RAW, torch.ones(2), torch.ones(2))
    diagnostics.summarise(RAW, 1.0)
    assert diagnostics.take()
    assert diagnostics.take() == {}
    diagnostics.summarise(RAW, 1.0)  # an empty batch
    assert diagnostics.take() == {}
