"""The small problems of the utility benchmarks: data, network, batch size, and one quiet training run.

Inputs are scaled by public constants: the range of a pixel, the ranges that the breast cancer data set's description
prints, the generator of MNIST-1D. Nothing is downloaded: two sets come with scikit-learn, the third is generated.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy


class Records(TensorDataset):
    """Inputs and labels, fetched one batch at a time; single reads would take a third of a step of these networks."""

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(tensor[indices].unbind() for tensor in self.tensors), strict=True))


@dataclass(frozen=True)
class Split:
    """The training records, and the records for judging."""

    train: TensorDataset
    held_out: TensorDataset


@dataclass(frozen=True)
class Task:
    """One data set and the network that is trained on it.

    Args:
        name: of the data set.
        load: returns inputs and labels of all records.
        test_size: records of the test split, which no choice is made on.
        validation_size: records taken out of the training split while learning rates are chosen.
        make_network: the module; its output is logits.
        batch_size: expected number of records per step.
        epochs: of a run.
    """

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    test_size: int
    validation_size: int
    make_network: Callable[[], nn.Module]
    batch_size: int
    epochs: int

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, ...]:
        inputs, labels = self.load()
        x_rest, x_test, y_rest, y_test = _divided(inputs, labels, self.test_size)
        x_train, x_valid, y_train, y_valid = _divided(x_rest, y_rest, self.validation_size)
        return x_rest, y_rest, x_test, y_test, x_train, y_train, x_valid, y_valid

    @property
    def for_report(self) -> Split:
        """The whole training split, judged on the test split."""
        return Split(_dataset(*self._parts[0:2]), _dataset(*self._parts[2:4]))

    @property
    def for_choice(self) -> Split:
        """The training split without the validation records, judged on those."""
        return Split(_dataset(*self._parts[4:6]), _dataset(*self._parts[6:8]))


def _divided(inputs: np.ndarray, labels: np.ndarray, size: int) -> list[np.ndarray]:
    return train_test_split(inputs, labels, test_size=size, random_state=0, stratify=labels)


def _dataset(inputs: np.ndarray, labels: np.ndarray) -> Records:
    return Records(torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.long))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1797 images of 8x8 pixels, ten classes."""
    images, labels = load_digits(return_X_y=True)
    return images / 16 - 0.3, labels


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Return 569 records of 30 numbers, two classes; each number scaled by the range that the set's description
    prints.
    """
    features, labels = load_breast_cancer(return_X_y=True)
    low, high = features.min(0), features.max(0)
    return 4 * (features - low) / (high - low) - 1, labels


def mnist1d() -> tuple[np.ndarray, np.ndarray]:
    """Return 5000 generated signals of 40 points, ten classes, from the generator's default arguments and seed."""
    from mnist1d.data import make_dataset

    made = make_dataset()
    return np.concatenate([made["x"], made["x_test"]]), np.concatenate([made["y"], made["y_test"]])


def perceptron(inputs: int, width: int, classes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """Return a network with one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, width), activation(), nn.Linear(width, classes))


TASKS = {
    task.name: task
    for task in (
        Task("digits", digits, 360, 240, functools.partial(perceptron, 64, 64, 10), 256, 30),
        Task("breast_cancer", breast_cancer, 142, 100, functools.partial(perceptron, 30, 32, 2), 128, 30),
        Task("mnist1d", mnist1d, 1000, 500, functools.partial(perceptron, 40, 64, 10, nn.ReLU), 512, 12),
    )
}


class Classifier(L.LightningModule):
    """A network, cross-entropy and SGD; the seed determines the initial weights.

    Args:
        network: makes the module.
        lr: learning rate.
        decay: whether the rate falls to nothing in a straight line over the run.
        seed: of the initial weights.
        momentum: of SGD.
    """

    def __init__(
        self, network: Callable[[], nn.Module], *, lr: float, decay: bool = False, seed: int = 0, momentum: float = 0.0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)  # weights only: sampling and noise are not seeded
        self.net = network()
        self.lr, self.decay, self.momentum = lr, decay, momentum

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        if not self.decay:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def train(
    task: Task,
    module: Classifier,
    train_set: TensorDataset,
    *,
    strategy: DPStrategy | None = None,
    callbacks: Sequence[L.Callback] = (),
    epochs: int | None = None,
) -> None:
    """Train the module for a task's number of epochs, without logs and checkpoints.

    Args:
        task: says the batch size.
        module: to train.
        train_set: the records.
        strategy: a private one; ``None`` trains without privacy.
        callbacks: of the Trainer.
        epochs: in place of the task's.
    """
    trainer = L.Trainer(
        max_epochs=task.epochs if epochs is None else epochs,
        strategy=strategy or "auto",
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train_set, batch_size=min(task.batch_size, len(train_set)), shuffle=True))


@torch.no_grad()
def accuracy(module: Classifier, records: TensorDataset) -> float:
    """Return the share of records whose largest logit is their label's."""
    inputs, labels = records.tensors
    return float((module.net(inputs).argmax(1) == labels).float().mean())


def be_quiet() -> None:
    """Use one thread and silence the Trainer's advice, because the runs are many and small."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
