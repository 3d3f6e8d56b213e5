"""Ten records of one person: what a run that protects records costs them, and a run that protects people at the same
epsilon.

    python examples/users.py            # four runs, under a minute on two cores
    python examples/users.py --smoke    # two short runs

scikit-learn's 8x8 digits were written by people who filled in forms, and images of one form follow each other in the
file. Ten images in a row count as one person here: 149 people train, 30 others test.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import DPStrategy
from lightning_dp.accounting import user_epsilon

EACH, PEOPLE, DELTA = 10, 149, 1e-4


class Digits(L.LightningDataModule):
    """Images of 149 people to train on, and of 30 others to test on; ``unit_ids`` says whose each training image is."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        features, targets = torch.as_tensor(images / 16.0 - 0.3).float(), torch.as_tensor(labels)
        num = EACH * PEOPLE
        self.unit_ids = torch.arange(num) // EACH
        self.train_set = TensorDataset(features[:num], targets[:num])
        self.test_set = TensorDataset(features[num:], targets[num:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=len(self.test_set))


class Classifier(L.LightningModule):
    """Softmax regression: few parameters, so little noise."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.lr, self.layer = lr, nn.Linear(64, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layer(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.layer(images), labels)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def train(strategy: DPStrategy, batch_size: int, max_epochs: int) -> float:
    """Train one model and return its accuracy on people who were not in the training set."""
    L.seed_everything(0, verbose=False)  # weights only: the noise cannot be seeded this way
    trainer = L.Trainer(
        max_epochs=max_epochs,
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Digits(batch_size))
    return float(trainer.callback_metrics["val_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one epsilon, a few epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    epochs = 3 if options.smoke else 20
    print(
        "| protects | epsilon of a record | epsilon of a person with 10 records | noise | accuracy "
        "|\n|---|---|---|---|---|"
    )
    for epsilon in (4.0,) if options.smoke else (2.0, 4.0):
        records = DPStrategy(target_epsilon=epsilon, target_delta=DELTA)
        accuracy = train(records, batch_size=300, max_epochs=epochs)
        person = user_epsilon(records.ledger, DELTA, records_per_user=EACH, discretization=0.02)
        sigma = records.plan.noise_multiplier
        print(f"| records | {records.epsilon():.2f} | {person:.2f} | {sigma:.2f} | {accuracy:.3f} |")
        people = DPStrategy(target_epsilon=epsilon, target_delta=DELTA, records_per_unit=EACH)
        of_people = train(people, batch_size=30, max_epochs=epochs)
        sigma = people.plan.noise_multiplier
        print(f"| people | | {people.epsilon():.2f} | {sigma:.2f} | {of_people:.3f} |")
        assert people.epsilon() <= epsilon < 2 * epsilon < person, f"Expected more than {2 * epsilon}, got {person}."
    print(people.privacy_statement())
    if not options.smoke:
        assert min(accuracy, of_people) > 0.7, f"Expected accuracies above 0.7, got {accuracy:.3f} and {of_people:.3f}."


if __name__ == "__main__":
    main()
