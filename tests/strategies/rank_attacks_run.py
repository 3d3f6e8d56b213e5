"""Run by test_rank_attacks.py in two processes: each rank writes down what the error of each run said."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_dp import DPDDPStrategy, DPFSDPStrategy, NoiseScheduler, PrivacyError
from tests.helpers import ByHand, make_dataset, make_trainer
from tests.strategies.sharded import ALSO_SHARDED, Sharded, plain

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


def with_a_rare_label() -> TensorDataset:
    features, labels = make_dataset().tensors
    labels = labels % 2
    labels[7] = 2
    return TensorDataset(features, labels)


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


ATTACKS: dict[str, Callable[[str], Any]] = {
    "loss of all ranks": lambda kind: fit(kind, Attack(loss_of_all_ranks)),
    "loss of the other rank": lambda kind: fit(kind, Attack(loss_of_the_other_rank)),
    "gathered loss": lambda kind: fit(kind, Attack(gathered_loss)),
    "loss of rank 0": lambda kind: fit(kind, Attack(loss_of_rank_0)),
    "later": lambda kind: fit(kind, Later()),
    "hook": lambda kind: fit(kind, Hooked()),
    "shuffled": lambda kind: fit(kind, data=loader(shuffled())),
    "halves": lambda kind: fit(kind, data=loader(Subset(make_dataset(), range(RANK, 64, 2)))),
    "longer": lambda kind: fit(kind, data=loader(make_dataset(64 + 8 * RANK))),
    "users": lambda kind: fit(kind, unit=users(), records_per_unit=2, data=loader(batch_size=2)),
    "stream": lambda kind: fit(kind, data=loader(Stream()), sampling="shuffle", neighboring_relation="replace_one"),
    "batch size": lambda kind: fit(kind, data=loader(batch_size=8 + 4 * RANK)),
    "bound": lambda kind: fit(kind, max_grad_norm=1.0 + RANK),
    "noise": lambda kind: fit(kind, noise_multiplier=1.0 + RANK),
    "schedule": lambda kind: fit(kind, callbacks=[NoiseScheduler("step", factor=0.9 - 0.1 * RANK)], epochs=2),
    "moved": lambda kind: fit(kind, Moved(), data=loader(make_dataset(32))),
    "plateau": lambda kind: fit(kind, Plateau(), data=loader(batch_size=32), epochs=3),
    "rare": lambda kind: fit(kind, Rare(), data=loader(with_a_rare_label()), epochs=10),
    "collective": lambda kind: fit(kind, Attack(lambda module, loss: loss_of_all_ranks(module, loss) * 0.0 + 1.0),
                                   microbatch_size=2),
}  # fmt: skip


def said(run: Callable[[str], Any], kind: str) -> str:
    """What the error of a run says."""
    try:
        run(kind)
    except PrivacyError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---------------------------------------------------------------- what is free


def talking(kind: str) -> tuple[int, bool]:
    """Steps of a run whose ranks talk in every microbatch, through Lightning."""

    def talk(module: Any, loss: Tensor) -> float:
        module.trainer.strategy.barrier()
        module.log("mean", module.all_gather(loss).mean())
        return 1.0

    trainer = fit(kind, Attack(talk), data=loader(make_dataset(32)), microbatch_size=2)
    return trainer.strategy.ledger.num_steps, bool(trainer.callback_metrics["mean"].isfinite())


class Seeded(Attack):
    """Seeds all generators alike on both ranks, before every batch and every step; its gradient is noise."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.released: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        L.seed_everything(1, verbose=False)
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        L.seed_everything(1, verbose=False)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads: list[Any] = [parameter.grad for parameter in self.parameters()]
        whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        self.released.append(torch.cat([grad.flatten() for grad in whole]).clone())
        L.seed_everything(1, verbose=False)


def seeded(kind: str) -> Tensor:
    """Released gradients of 12 steps, and of 12 more after a resume; without checks, which draw no noise."""
    first, second = Seeded(), Seeded()
    fit(kind, first, epochs=3, check_per_sample=False).save_checkpoint(OUT / f"{kind}.ckpt")
    fit(kind, second, epochs=6, resume=OUT / f"{kind}.ckpt", check_per_sample=False)
    return torch.stack(first.released + second.released)


def without_sync(kind: str) -> tuple[int, Tensor]:
    """Steps and weights of a manual run that asks for no synchronisation."""

    class Module(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            with self.optimizers().toggle_model(sync_grad=False):
                super().training_step(batch, batch_idx)

    module = Module()
    trainer = fit(kind, module, epochs=2, check_per_sample=False)
    weights: list[Any] = list(module.parameters())
    whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in weights]
    return trainer.strategy.ledger.num_steps, torch.cat([each.detach().flatten() for each in whole])


def hook_calls(kind: str) -> int:
    """Calls of hooks on parameters, which would see raw gradients."""
    seen: list[Any] = []

    class Module(Attack):
        def on_train_start(self) -> None:
            for parameter in self.parameters():
                parameter.register_hook(seen.append)

    fit(kind, Module(), data=loader(make_dataset(16)))  # one step
    return len(seen)


def main(*, rest: bool = False) -> None:
    """Run all under DDP and two attacks under FSDP, or the rest under FSDP."""
    others = [name for name in ATTACKS if name not in (*ALSO_SHARDED, "collective")]
    chosen = {"fsdp": others} if rest else {"ddp": [*ATTACKS], "fsdp": [*ALSO_SHARDED]}
    seen: dict[str, Any] = {kind: {name: said(ATTACKS[name], kind) for name in names} for kind, names in chosen.items()}
    kind = "fsdp" if rest else "ddp"
    seen[kind] |= {free.__name__: free(kind) for free in (talking, seeded, without_sync, hook_calls)}
    torch.save(seen, OUT / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
