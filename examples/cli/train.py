"""A module, a datamodule and `LightningCLI`: everything private is in `dp.yaml`, or on the command line.

python examples/cli/train.py fit --config examples/cli/dp.yaml
python examples/cli/train.py fit --config examples/cli/dp.yaml --trainer.strategy.target_epsilon=3
python examples/cli/train.py fit --trainer.strategy=lightning_dp.DPStrategy --trainer.strategy.target_epsilon=3
python examples/cli/train.py fit --trainer.strategy.help=lightning_dp.DPStrategy
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """1797 images of 8 x 8 pixels that come with scikit-learn; a quarter of them is for validation.

    Args:
        batch_size: expected number of records of a batch.
    """

    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
        train_x, val_x, train_y, val_y = parts
        self.train = TensorDataset(torch.tensor(train_x, dtype=torch.float32), torch.tensor(train_y))
        self.val = TensorDataset(torch.tensor(val_x, dtype=torch.float32), torch.tensor(val_y))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=512)


class Classifier(L.LightningModule):
    """Two layers; nothing in it knows of privacy.

    Args:
        hidden: width of the hidden layer.
        lr: learning rate of SGD with momentum.
    """

    def __init__(self, hidden: int = 64, lr: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        correct = self.network(images).argmax(1) == labels
        self.log("val_accuracy", correct.float().mean(), prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits)
