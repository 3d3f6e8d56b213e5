"""Small modules, data and Trainers that the tests share; plain Lightning, nothing of them knows of privacy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

NUM_RECORDS, NUM_FEATURES, NUM_CLASSES = 64, 6, 3


def make_dataset(num_records: int = NUM_RECORDS, *, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Features, and labels that depend on them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_records, NUM_FEATURES, generator=generator, dtype=dtype)
    return TensorDataset(features, features[:, :NUM_CLASSES].argmax(1))


def make_loader(num_records: int = NUM_RECORDS, batch_size: int = 16, **options: Any) -> DataLoader:
    """The loader a user would write."""
    return DataLoader(make_dataset(num_records), batch_size=batch_size, shuffle=True, **options)


class Classifier(L.LightningModule):
    """Two layers and cross-entropy; ``optimizer`` and ``network`` can be swapped."""

    def __init__(
        self,
        network: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 0.1,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = network or nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
        self.optimizer, self.lr = optimizer, lr

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        return nn.functional.cross_entropy(self(features), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        features, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(features), labels))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.lr)


def stepped_on(module: Any, loss: Tensor) -> Tensor | None:
    """Return a loss; under manual optimization, step on it and return None, as a training step does."""
    if module.automatic_optimization:
        return loss
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(loss)
    optimizer.step()
    return None


def make_trainer(strategy: Any, tmp_path: Any, **options: Any) -> L.Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(strategy=strategy, **{**defaults, **options})


class Recorder(L.Callback):
    """Keeps what a user's hooks could see: gradients after each backward, and before each optimizer step."""

    def __init__(self) -> None:
        self.after_backward: list[dict[str, Tensor | None]] = []
        self.before_step: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after_backward.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()}
        )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.before_step.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)


class Hidden(torch.autograd.Function):
    """A product with a weight that reports nothing. It draws a number, so it cannot run again for each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        torch.rand(())
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.mT, torch.einsum("...i,...o->io", x, grads[0])


class ByHand(L.LightningModule):
    """Mixed into a module of one optimizer, whose ``training_step`` returns a loss: it steps by itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Largest(TorchDispatchMode):
    """Elements of the largest memory that an operation allocates while this is entered: ``elements``."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _has_memory(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _has_memory(tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _has_memory(thing: Any) -> bool:
    """Whether something is a tensor with memory of its own: a distributed one only holds another that has."""
    return isinstance(thing, Tensor) and not hasattr(thing, "to_local")
