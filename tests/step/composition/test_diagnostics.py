"""Diagnostics of a run under several mechanisms."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_dp import (
    GradientDiagnostics,
)
from tests.helpers import Classifier
from tests.step.composition.table import Combination, fit, make_data


@pytest.mark.parametrize("clipping", ["flat", "top_agg_values"])
@pytest.mark.parametrize("mask", ["pruned", "dense"])
def test_diagnostics_are_those_of_the_batch(tmp_path: Any, clipping: str, mask: str) -> None:
    values: list[dict[str, float]] = []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            values.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    combination = Combination(clipping, mask=mask)
    diagnostics = GradientDiagnostics()
    strategy, module, _ = fit(
        combination,
        tmp_path,
        batch_size=12,
        microbatch_size=5,
        module=Classifier(lr=0.0),
        callbacks=[diagnostics, Read()],
        trainer_options={"max_epochs": 1},
    )
    features, labels = make_data().tensors
    rows = []
    for record, label in zip(features, labels, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(record[None]), label[None]).backward()
        rows.append(torch.cat([p.grad.flatten() * (p != 0).flatten() for p in module.parameters()]))
    grads = torch.stack(rows)  # pruned weights are zero; biases start at nonzero values
    norms = grads.norm(dim=1)
    if clipping == "flat":
        kept = grads * (0.5 / norms).clamp(max=1)[:, None]
    else:
        magnitude = grads.abs()
        top = (
            torch.zeros_like(grads).scatter(
                1,
                magnitude.topk(strategy.settings.make_clipping().for_coordinates(grads.shape[1]).k, dim=1).indices,
                1.0,
            )
            * grads
        )
        kept = top * (1.0 / top.norm(dim=1)).clamp(max=1)[:, None]
    shortened = (kept.norm(dim=1) < norms * (1 - 1e-4)).float().mean()
    bias = torch.cosine_similarity(kept.sum(0), grads.sum(0), dim=0)
    (logged,) = values
    assert logged["nonprivate/clip_fraction"] == pytest.approx(float(shortened))
    assert logged["nonprivate/clipping_bias"] == pytest.approx(float(bias), abs=1e-5)
    bound = 0.5 if clipping == "flat" else 1.0
    live = int((module.network[0].weight != 0).sum() + (module.network[2].weight != 0).sum()) + 8
    expected = 2.0 * bound * live**0.5 / float(kept.sum(0).norm())
    assert logged["nonprivate/noise_to_signal"] == pytest.approx(expected, rel=1e-4)
    assert "nonprivate/clip_fraction" in strategy.privacy_statement()


def test_diagnostics_are_off_by_default(tmp_path: Any) -> None:
    strategy, _, trainer = fit(Combination(), tmp_path)
    assert not [name for name in trainer.callback_metrics if name.startswith("nonprivate/")]
    assert "logged without noise" not in strategy.privacy_statement()
