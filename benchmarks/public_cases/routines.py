"""Cases of packages that bring LightningModules of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.public_cases.layers import CLASSES, NUM, floats, labels
from benchmarks.public_cases.registry import BATCH, case, fit


class Rows(Dataset[Any]):
    """Records as dictionaries of input and target."""

    def __init__(self) -> None:
        self.inputs, self.targets = floats(4), floats(1)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        return {"input": self.inputs[index], "target": self.targets[index]}


def small(num_out: int) -> nn.Module:
    """Return a perceptron."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, num_out))


@case("lightning-uq-box")
def mean_variance(arguments: dict[str, Any]) -> None:
    """Regression of mean and variance, with metrics that it logs."""
    from lightning_uq_box.uq_methods import MVERegression

    fit(MVERegression(small(2), burnin_epochs=1), DataLoader(Rows(), batch_size=BATCH), arguments)


@case("lightning-uq-box")
def quantiles(arguments: dict[str, Any]) -> None:
    """Regression of quantiles by the pinball loss."""
    from lightning_uq_box.uq_methods import QuantileRegression

    fit(QuantileRegression(small(3)), DataLoader(Rows(), batch_size=BATCH), arguments)


@case("torch-uncertainty")
def routine(arguments: dict[str, Any]) -> None:
    """Routine of classification, with its metrics."""
    from torch_uncertainty.routines import ClassificationRoutine

    net = small(CLASSES)
    module = ClassificationRoutine(
        net, num_classes=CLASSES, loss=nn.CrossEntropyLoss(), optim_recipe=torch.optim.Adam(net.parameters(), lr=1e-3)
    )
    fit(module, DataLoader(TensorDataset(floats(4), labels()), batch_size=BATCH), arguments)
