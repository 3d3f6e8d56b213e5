"""Private digits: epsilon 1 at delta 1e-5 on scikit-learn's 8x8 images, with epsilon on the progress bar.

    python examples/digits.py            # three seeds, under a minute on two cores
    python examples/digits.py --smoke    # one short run

The module and the datamodule know nothing of privacy: take ``strategy=`` and ``EpsilonMonitor`` away and they train as
ever.
"""

from __future__ import annotations

import argparse
import csv
import logging
import shutil
import statistics
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import DPStrategy, EpsilonMonitor

OUT = Path(__file__).parent / "out"


class Digits(L.LightningDataModule):
    """1437 training and 360 test images, pixels scaled and centred by public constants."""

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16.0 - 0.3, labels, test_size=360, random_state=0, stratify=labels)
        x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
        self.train_set = TensorDataset(x_train.float(), y_train)
        self.test_set = TensorDataset(x_test.float(), y_test)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=360)


class Classifier(L.LightningModule):
    """A multilayer perceptron, 64-64-10."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def train(seed: int, max_epochs: int) -> tuple[float, Path]:
    """Trains one model and returns its test accuracy in the last epoch and the CSV log."""
    L.seed_everything(seed, verbose=False)  # weights only: the noise cannot be seeded this way
    logger = CSVLogger(OUT, name="digits", version=f"seed_{seed}")
    trainer = L.Trainer(
        max_epochs=max_epochs,
        strategy=DPStrategy(target_epsilon=1.0, target_delta=1e-5, max_grad_norm=1.0),
        callbacks=[EpsilonMonitor(every_n_steps=1)],
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Digits())
    print(trainer.strategy.privacy_statement())
    return float(trainer.callback_metrics["val_accuracy"]), Path(logger.log_dir) / "metrics.csv"


def plot(log: Path, target: Path) -> None:
    """Draws epsilon and accuracy over the steps of one run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(csv.DictReader(log.read_text().splitlines()))
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    for axis, key, colour, label in (
        (left, "epsilon", "tab:blue", "epsilon (delta = 1e-5)"),
        (right, "val_accuracy", "tab:orange", "test accuracy"),
    ):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]
        axis.plot(*zip(*points, strict=True), color=colour)
        axis.set_ylabel(label, color=colour)
        axis.set_ylim(0, 1.05)
    left.set_xlabel("logical step (one Poisson batch each)")
    left.set_title("Private digits: what is spent, what is learned")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help="one run of three epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    seeds, epochs = (1, 3) if options.smoke else (options.seeds, options.epochs)
    shutil.rmtree(OUT, ignore_errors=True)
    accuracies, log = [], OUT
    for seed in range(seeds):
        accuracy, log = train(seed, epochs)
        accuracies.append(accuracy)
    plot(log, OUT / "digits.png")
    median = statistics.median(accuracies)
    print(f"test accuracy in the last epoch: {', '.join(f'{a:.3f}' for a in accuracies)}; median {median:.3f}")
    print(f"log: {log}\npicture: {OUT / 'digits.png'}")
    assert median >= (0.3 if options.smoke else 0.88), f"Expected a median of at least 0.88, got {median:.3f}."


if __name__ == "__main__":
    main()
