"""Exponential averages of the weights of a run, and the accuracy of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import TensorDataset

#: Decays of the averages of the weights; step t uses min(decay, (1 + t) / (10 + t)).
DECAYS = (0.95, 0.98, 0.99)


class Averages(L.Callback):
    """Exponential averages of the weights, one per decay; the module itself is left alone.

    Lightning's ``WeightAveraging`` with such an ``avg_fn`` differs in one thing: it begins with the weights of step 1.

    Args:
        decays: d; step t = 1, 2, ... uses min(d, (1 + t) / (10 + t)).
    """

    def __init__(self, decays: Iterable[float] = DECAYS) -> None:
        self.decays = tuple(decays)
        self.weights: dict[float, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = parameters_to_vector(pl_module.parameters()).detach()
        self.weights = {decay: start.clone() for decay in self.decays}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        now, step = parameters_to_vector(pl_module.parameters()).detach(), trainer.global_step
        for decay, weights in self.weights.items():
            weights.lerp_(now, 1 - min(decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def accuracies(
        self, module: L.LightningModule, network: torch.nn.Module, records: TensorDataset
    ) -> dict[str, float]:
        """Return the accuracy by decay; the module has its own weights again afterwards."""
        last, found = parameters_to_vector(module.parameters()).clone(), {}
        for decay, weights in self.weights.items():
            vector_to_parameters(weights, module.parameters())
            found[f"{decay:g}"] = accuracy(network, records)
        vector_to_parameters(last, module.parameters())
        return found


@torch.no_grad()
def accuracy(network: torch.nn.Module, records: TensorDataset) -> float:
    """Return the share of records whose largest logit is their label's."""
    inputs, labels = records.tensors
    hits = [(network(x).argmax(1) == y).sum() for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)]
    return float(sum(hits)) / len(labels)
