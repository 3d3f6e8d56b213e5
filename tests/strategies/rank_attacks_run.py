"""Run by test_rank_attacks.py in two processes: each rank writes down what the error of each run said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_dp import NoiseScheduler, PrivacyError
from tests.helpers import make_dataset
from tests.strategies.rank_attacks import (
    OUT,
    RANK,
    Attack,
    Following,
    FollowingAMean,
    Hooked,
    Later,
    Manual,
    Moved,
    Plateau,
    Rare,
    Shared,
    Stream,
    Tripled,
    fit,
    fit_small,
    gathered_loss,
    loader,
    loss_of_all_ranks,
    loss_of_rank_0,
    loss_of_the_other_rank,
    shuffled,
    users,
    with_a_rare_label,
)
from tests.strategies.sharded import ALSO_SHARDED, NOT_SHARDED

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
    "share": lambda kind: fit(kind, Shared()),
    "next to one": lambda kind: fit_small(kind, Tripled(), 45),
    "gathered figure": lambda kind: fit_small(kind, Following(), 149),
    "mean of a figure": lambda kind: fit_small(kind, FollowingAMean(), 149),
    "next to none": lambda kind: fit_small(kind, Rare(), 261),
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
    others = [name for name in ATTACKS if name not in (*ALSO_SHARDED, *NOT_SHARDED, "collective")]
    chosen = {"fsdp": others} if rest else {"ddp": [*ATTACKS], "fsdp": [*ALSO_SHARDED]}
    seen: dict[str, Any] = {kind: {name: said(ATTACKS[name], kind) for name in names} for kind, names in chosen.items()}
    kind = "fsdp" if rest else "ddp"
    seen[kind] |= {free.__name__: free(kind) for free in (talking, seeded, without_sync, hook_calls)}
    torch.save(seen, OUT / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
