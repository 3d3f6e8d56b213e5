"""Augmentation multiplicity: K views of a sample, flattened into the batch, are one sample with one clipped
gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_trainer
from tests.reference import per_sample_gradients
from tests.step.composition.table import NoiseSpy, make_data

K, R = 3, 0.7


def images(num_records: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.randn(num_records, 2, 6, 6, generator=generator)
    return TensorDataset(pictures, pictures.mean((1, 2, 3)).gt(0).long())


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, NUM_CLASSES))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))


#: network, data
CASES: dict[str, Any] = {"dense": (dense, make_data), "convolutional": (convolutional, images)}


class Augmenting(Classifier):
    """The mean loss over K views of each sample, flattened to (B*K), or to (K*B) with the views first."""

    views_first = False
    per_sample_loss = False

    def views(self, inputs: Tensor) -> Tensor:
        """Shape (B, K, ...): the sample itself, mirrored, and damped."""
        return torch.stack([inputs, inputs.flip(-1), 0.5 * inputs], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        views = self.views(inputs)
        if self.views_first:
            logits, labels = self(views.transpose(0, 1).flatten(0, 1)), labels.repeat(K)
        else:
            logits, labels = self(views.flatten(0, 1)), labels.repeat_interleave(K)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses.view(-1, K).mean(1) if self.per_sample_loss else losses.mean()


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize(
    ("views_first", "per_sample_loss"),
    [(False, False), (False, True), (True, False)],
    ids=["mean of all", "loss a sample", "views first"],
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.one_in(3)
def test_views_of_a_sample_are_clipped_together(
    case: str,
    views_first: bool,
    per_sample_loss: bool,
    microbatch_size: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The independence check passes, and the sum is that of the clipped gradients of each sample's mean over its
    views.
    """
    make_network, make_dataset = CASES[case]
    data = make_dataset()
    module = Augmenting(make_network(), lr=0.0)
    module.views_first, module.per_sample_loss = views_first, per_sample_loss
    spy = NoiseSpy(monkeypatch)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, max_grad_norm=R, microbatch_size=microbatch_size)
    make_trainer(strategy, tmp_path).fit(module, DataLoader(data, batch_size=len(data), shuffle=True))

    inputs, labels = data.tensors
    grads = per_sample_gradients(
        module,
        lambda i: nn.functional.cross_entropy(module(module.views(inputs[i : i + 1])[0]), labels[i].repeat(K)),
        len(data),
    )
    flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
    norms = flat.norm(dim=1)
    assert bool((norms > R).any())
    expected = (flat * (R / norms).clamp(max=1)[:, None]).sum(0)
    (draw,) = spy.draws
    torch.testing.assert_close(draw.before, expected, rtol=1e-4, atol=1e-5)
    assert draw.std == R
    (run,) = strategy.ledger.entries
    assert (run.event.sample_rate, run.num_steps) == (1.0, 1)
