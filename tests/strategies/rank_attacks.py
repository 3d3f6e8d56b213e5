"""Modules and fits of the processes that rank_attacks_run.py starts: attacks by what differs between ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dp import DPDDPStrategy, DPFSDPStrategy
from tests.helpers import ByHand, make_dataset, make_trainer
from tests.strategies.sharded import Sharded, plain

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])
STRATEGIES: dict[str, Any] = {"ddp": DPDDPStrategy, "fsdp": DPFSDPStrategy}


class Attack(Sharded):
    """A classifier under either strategy.

    Args:
        scale: (module, loss, batch_idx) -> factor on the loss.
    """

    def __init__(self, scale: Callable[[Any, Tensor], Any] | None = None, **options: Any) -> None:
        super().__init__(plain(), **options)
        self.scale = scale

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, DPFSDPStrategy):
            super().configure_model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss if self.scale is None else loss * self.scale(self, loss.detach())


class Manual(ByHand, Attack):
    """A classifier that steps by itself."""


def loader(dataset: Any = None, batch_size: int = 8) -> DataLoader:
    return DataLoader(make_dataset() if dataset is None else dataset, batch_size=batch_size)


def fit(
    kind: str,
    module: Any = None,
    data: Any = None,
    callbacks: Any = (),
    epochs: int = 1,
    resume: Any = None,
    **options: Any,
) -> Any:
    options = {"noise_multiplier": 1.0, "target_delta": 1e-3, **options}
    strategy = STRATEGIES[kind](**options)
    trainer = make_trainer(strategy, OUT, devices=2, max_epochs=epochs, callbacks=list(callbacks))
    data = loader() if data is None else data
    trainer.fit(module or Attack(), data, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


# ---------------------------------------------------------------- a loss that follows records of other ranks


def loss_of_all_ranks(module: Any, loss: Tensor) -> Tensor:
    total = loss.clone()
    dist.all_reduce(total)
    return total


def loss_of_the_other_rank(module: Any, loss: Tensor) -> Tensor:
    both = [torch.zeros_like(loss) for _ in range(2)]
    dist.all_gather(both, loss)
    return both[1 - RANK]


def gathered_loss(module: Any, loss: Tensor) -> Tensor:
    return module.all_gather(loss).mean()


def loss_of_rank_0(module: Any, loss: Tensor) -> float:
    return module.trainer.strategy.broadcast(float(loss))


class Later(Attack):
    """The loss begins to couple records within the first pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * loss.detach() if batch_idx == 2 else loss


class Hooked(Attack):
    """A backward hook scales gradients by their length over all ranks."""

    def on_train_start(self) -> None:
        def scaled(module: Any, given: Any, returned: Any) -> Any:
            length = returned[0].detach().norm()
            dist.all_reduce(length)
            return tuple(None if each is None else each * length for each in given)

        network: Any = self.network
        network[2].register_full_backward_hook(scaled)


# ---------------------------------------------------------------- ranks that differ


class Moved(Attack):
    """One rank moves a weight that no unit shards."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features) + self.shift

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            self.shift += RANK


class Plateau(Attack):
    """A scheduler follows a figure of its own rank."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = {"scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "figure"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_epoch_end(self) -> None:
        self.log("figure", -float(RANK * self.current_epoch))


class Rare(Attack):
    """A label that one record has, so one rank, changes the loss of all later steps."""

    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) * self.factor
        if (batch[1] == 2).any():
            self.factor = 2.0
        return loss


class Tripled(Attack):
    """The rare label triples the loss of its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (3.0 if (batch[1] == 2).any() else 1.0)


class Shared(Attack):
    """A sum of losses over the number of records that all ranks have drawn."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        num = self.all_gather(torch.tensor(float(len(batch[1])))).sum()
        return super().training_step(batch, batch_idx) * len(batch[1]) * 2 / num


class Following(Attack):
    """Scores follow how often ranks have the rare label, and no line of code reads that number."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        own = (batch[1] == 2).float().max()
        return nn.functional.cross_entropy(self(batch[0]) * (1 + 9 * (self.figure(own) - own)), batch[1])

    def figure(self, own: Tensor) -> Tensor:
        return self.all_gather(own).mean()


class FollowingAMean(Following):
    def figure(self, own: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(own, reduce_op="mean")


def with_a_rare_label(size: int = 64, rare: int = 7) -> TensorDataset:
    features, labels = make_dataset(size).tensors
    labels = labels % 2
    labels[rare] = 2
    return TensorDataset(features, labels)


def fit_small(kind: str, module: Any, rare: int) -> Any:
    """Two records per rank: the rank of the rare record draws it first with others, while the other one draws none or
    one. No check reads it before.
    """
    return fit(kind, module, loader(with_a_rare_label(300, rare), batch_size=2), seed=3)


class Stream(IterableDataset):
    """The same records on every rank."""

    def __iter__(self) -> Any:
        return iter(make_dataset())

    def __len__(self) -> int:
        return 64


def shuffled() -> TensorDataset:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(RANK + 5))
    return TensorDataset(*(tensor[order] for tensor in make_dataset().tensors))


def users() -> list[int]:
    return [(record + 2 * RANK) % 64 // 4 for record in range(64)]
