"""Models, loaders and losses of the private loop, and a start of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp.loop import PrivateLoop, make_private
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_dataset
from tests.reference import per_sample_gradients

SIZE, BATCH = 32, 8
CLOSE = {"rtol": 3e-6, "atol": 3e-7}  # the clipping keeps a margin of 1e-6 for rounding


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)).double()


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def double_loader(size: int = SIZE, batch_size: int = BATCH) -> DataLoader:
    return DataLoader(make_dataset(size, dtype=torch.float64), batch_size=batch_size, shuffle=True)


def start(
    model: nn.Module | None = None, loss_fn: Any = mean_loss, optimizer: Any = None, **options: Any
) -> PrivateLoop:
    """A run over the small classifier, without noise unless asked for."""
    model = make_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if optimizer is None else optimizer
    if "target_epsilon" not in options:
        options = {"noise_multiplier": 0.0, **options}
    return make_private(model, optimizer, options.pop("loader", double_loader()), loss_fn, **options)


def drawn_samples(batch: Any) -> tuple[Tensor, Tensor]:
    parts = [part for _, part in batch.microbatches]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def clipped_mean(model: nn.Module, batch: Any, bound: float, divisor: int = BATCH) -> dict[str, Tensor]:
    """The private gradient without noise, one sample at a time."""
    features, labels = drawn_samples(batch)
    grads = per_sample_gradients(
        model, lambda i: mean_loss(model, (features[i : i + 1], labels[i : i + 1])), len(features)
    )
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, grad) / divisor for name, grad in grads.items()}


# ---------------------------------------------------------------- saving and resuming


def train(private: PrivateLoop, steps: int) -> None:
    for batch in private.loader:
        private.step(batch)
        if private.steps_taken == steps:
            return
