"""Tabular data within a budget: two ways to say how much privacy may be spent, on scikit-learn's breast cancer records.

    python examples/tabular.py            # about 15 seconds
    python examples/tabular.py --smoke    # fewer epochs

1. ``target_epsilon``: the length of the run is fixed, the noise is calibrated to end at the budget or just below.
2. ``PrivacyBudget``: the noise is fixed, the run stops before the step that would exceed the budget.

Columns are scaled by round numbers known beforehand: a mean or a maximum of the data would be another release of it.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import BinaryAccuracy

from lightning_dp import DPStrategy, PrivacyBudget

#: What the ten measurements of a cell nucleus are divided by, for their mean, standard error and worst value.
SCALES = (15, 20, 100, 600, 0.1, 0.1, 0.1, 0.05, 0.2, 0.06)
SHRINK = (1.0, 0.05, 1.3)
EPSILON, DELTA = 1.0, 1e-4


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """455 training and 114 test records."""
    table, labels = load_breast_cancer(return_X_y=True)
    scales = torch.tensor([scale * shrink for shrink in SHRINK for scale in SCALES])
    parts = train_test_split(table, labels, test_size=0.2, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part, dtype=torch.float32) for part in parts)
    return TensorDataset(x_train / scales - 1, y_train), TensorDataset(x_test / scales - 1, y_test)


class Diagnosis(L.LightningModule):
    """Logistic regression."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 1)
        nn.init.zeros_(self.linear.weight)
        self.accuracy = BinaryAccuracy()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        table, labels = batch
        return nn.functional.binary_cross_entropy_with_logits(self.linear(table)[:, 0], labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        table, labels = batch
        self.accuracy(self.linear(table)[:, 0].sigmoid(), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(strategy: DPStrategy, max_epochs: int, callbacks: list[L.Callback]) -> tuple[L.Trainer, float]:
    """Fits and tests one model; returns the Trainer and the test accuracy."""
    L.seed_everything(0, verbose=False)  # weights only: the noise cannot be seeded this way
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {"accelerator": "cpu", **quiet}
    trainer = L.Trainer(max_epochs=max_epochs, strategy=strategy, callbacks=callbacks, **options)
    train_set, test_set = datasets()
    module = Diagnosis()
    trainer.fit(module, DataLoader(train_set, batch_size=64, shuffle=True))
    statement = strategy.privacy_statement()
    (result,) = L.Trainer(**options).test(module, DataLoader(test_set, batch_size=114), verbose=False)
    print(f"{statement}\ntest accuracy {result['test_accuracy']:.3f}\n")
    return trainer, result["test_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="five epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    epochs = 5 if options.smoke else options.epochs

    calibrated = DPStrategy(target_epsilon=EPSILON, target_delta=DELTA)
    trainer, accuracy = train(calibrated, epochs, [])
    assert trainer.current_epoch == epochs
    assert 0.97 * EPSILON < calibrated.epsilon() <= EPSILON

    stopped = DPStrategy(noise_multiplier=calibrated.plan.noise_multiplier, target_delta=DELTA)
    trainer, _ = train(stopped, 10 * epochs, [PrivacyBudget(EPSILON)])
    assert trainer.current_epoch < 10 * epochs
    assert 0.97 * EPSILON < stopped.epsilon() <= EPSILON
    assert accuracy >= 0.85, f"Expected an accuracy of at least 0.85, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
