"""A convolutional network on 8x8 digits at epsilon 3: large logical batches on a small device, stopped by a budget.

    python examples/digits_cnn.py            # under half a minute on two cores
    python examples/digits_cnn.py --smoke    # three epochs

Each logical batch (512 samples expected) is computed 64 samples at a time (``microbatch_size``): the noise, the ledger
and the result are those of the whole batch. GroupNorm stands where BatchNorm would: it treats each sample alone.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L
import torch
from digits import Digits
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import DPStrategy, EpsilonMonitor, PrivacyBudget

EPSILON = 3.0


class ConvClassifier(L.LightningModule):
    """Two convolutions, each with GroupNorm, tanh and pooling, and a linear head."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.net(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="three epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)  # weights only: the noise cannot be seeded this way
    trainer = L.Trainer(
        max_epochs=3 if options.smoke else 40,
        strategy=DPStrategy(target_epsilon=EPSILON, target_delta=1e-5, microbatch_size=64),
        callbacks=[EpsilonMonitor(), PrivacyBudget(EPSILON)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(ConvClassifier(), datamodule=Digits(batch_size=512))
    print(trainer.strategy.privacy_statement())
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"test accuracy in the last epoch: {accuracy:.3f} at epsilon {trainer.strategy.epsilon():.3f}")
    assert trainer.strategy.epsilon() <= EPSILON
    assert accuracy >= (0.3 if options.smoke else 0.8), f"Expected a model that has learned, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
