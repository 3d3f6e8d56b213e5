"""The registry of cases, and helpers that train their modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

EPOCHS, BATCH = 8, 16


@dataclass(frozen=True)
class Case:
    """A model of a public package.

    Args:
        package: the package's name on its index.
        train: trains the model with the given arguments of a Trainer.
        options: further arguments of the strategy.
        refused: pattern of the message of a model that cannot be private, because its samples depend on each other.
    """

    package: str
    train: Callable[[dict[str, Any]], Any]
    options: dict[str, Any]
    refused: str | None

    @property
    def title(self) -> str:
        """The name of the model."""
        return (self.train.__doc__ or "").strip().rstrip(".")

    @property
    def tree(self) -> str:
        """The package of Lightning whose Trainer trains the model."""
        return (
            "pytorch_lightning"
            if self.package in ("darts", "neuralforecast", "pytorch-tabular")
            else "lightning.pytorch"
        )


CASES: dict[str, Case] = {}


def case(package: str, *, refused: str | None = None, **options: Any) -> Callable[[Any], Any]:
    """Enter a function that trains a model; see :class:`Case`."""

    def enter(train: Callable[[dict[str, Any]], Any]) -> Any:
        if train.__name__ in CASES:
            raise ValueError(f"Expected a name of its own for each case, got {train.__name__!r} twice.")
        CASES[train.__name__] = Case(package, train, options, refused)
        return train

    return enter


def fit(module: Any, data: Any, arguments: dict[str, Any], package: str = "lightning.pytorch") -> Any:
    """Train a module with a Trainer of one of the two packages of Lightning; if private, save and resume, too."""
    trainer = importlib.import_module(package).Trainer(max_epochs=EPOCHS, **arguments)
    trainer.fit(module, data)
    if arguments["strategy"] != "auto":
        path = Path(arguments["default_root_dir"]) / "resume.ckpt"
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs += 1
        steps = trainer.strategy.ledger.num_steps
        trainer.fit(module, data, ckpt_path=path, weights_only=False)
        if trainer.strategy.ledger.num_steps <= steps:
            raise RuntimeError("The resumed run took no step.")
    return trainer


def without_checkpoint_flag(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for packages that bring a checkpoint callback of their own."""
    return {name: value for name, value in arguments.items() if name != "enable_checkpointing"}


class Task:
    """A LightningModule around a model and a loss of model and batch."""

    def __new__(cls, model: nn.Module, loss: Callable[[nn.Module, Any], Any]) -> Any:
        """Return the module."""
        import lightning as L

        class Module(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return loss(self.model, batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)

        return Module()
