"""Run by test_fsdp.py in two processes: each case trains a sharded module, and each rank writes down what it saw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    DPFSDPStrategy,
    EpsilonMonitor,
)
from lightning_dp.clipping import FlatClipping
from lightning_dp.step.shards import Shards
from lightning_dp.step.step import PrivateStep
from tests.helpers import NUM_CLASSES, NUM_FEATURES, ByHand, Largest, make_dataset
from tests.strategies.fsdp_fits import DEVICES, OUT, RANK, Released, fit, private, said, whole
from tests.strategies.fsdp_plans import planned, refused
from tests.strategies.fsdp_saving import resumed_alone, saving
from tests.strategies.releases import releases_of
from tests.strategies.sharded import CASES, REPEATED, Sharded, plain

#: Cases whose samples are checked, in a run of their own: each network once, but for that of "flat", which
#: ``checked_training`` checks, and in each precision; the checks know of nothing else.
CHECKED = ("tied, recomputed", "bfloat16", "weight norm, frozen", "adapter")


class Partly(Sharded):
    """A sharded network, and a parameter that no unit gathers: every rank holds all of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(plain(), **options)
        self.shift = nn.Parameter(torch.zeros(NUM_CLASSES) + float(RANK))  # start apart on purpose
        self.sizes: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features) + self.shift

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch[0]))


class Silent(Partly):
    """No gradient at all: what its optimizer sees is noise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0


class Skipping(Sharded):
    """Returns no loss for some batches.

    Args:
        skips: (rank, batch_idx) -> whether there is none.
    """

    def __init__(self, skips: Callable[[int, int], bool]) -> None:
        super().__init__(plain())
        self.skips = skips

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return None if self.skips(RANK, batch_idx) else output


def sums_of(names: Iterable[str], *, checked: bool = False) -> dict[str, Any]:
    """The sum over ranks, without noise, in each case."""
    found = {}
    for name in names:
        network, shard, options, callbacks, trainer_options = CASES[name]
        released = Released()
        strategy = private(noise_multiplier=0.0, max_grad_norm=0.7, check_per_sample=checked, **options)
        batch_size = 32 // trainer_options.get("accumulate_grad_batches", 1)
        loader = DataLoader(make_dataset(), batch_size=batch_size)
        fit(
            Sharded(network(), shard, lr=0.0),
            loader,
            [*callbacks(), released],
            strategy,
            max_steps=1,
            **trainer_options,
        )
        found[name] = released.grads[0]
    return found


def sums() -> dict[str, Any]:
    return sums_of(name for name in CASES if name not in REPEATED)


def repeated_sums() -> dict[str, Any]:
    return sums_of(REPEATED)


def checked_sums() -> dict[str, Any]:
    return sums_of(CHECKED, checked=True)


class Manual(ByHand, Sharded):
    """A sharded module that steps by itself."""


def manual() -> dict[str, Any]:
    """The sum over ranks of one step in microbatches, without noise; then noisy steps on unequal batches."""
    released, loader = Released(), DataLoader(make_dataset(), batch_size=32)
    strategy = private(noise_multiplier=0.0, max_grad_norm=0.7, microbatch_size=7)
    fit(Manual(plain(), lr=0.0), loader, [released], strategy, max_steps=1)
    module = Manual(plain(), lr=0.05)
    loader = DataLoader(make_dataset(40), batch_size=2)
    trainer = fit(module, loader, strategy=private(microbatch_size=2), max_epochs=2)
    weights = whole(dict(module.named_parameters()))
    return {
        "sum": released.grads[0],
        "steps": trainer.strategy.ledger.num_steps,
        "weights": torch.cat([w.flatten() for w in weights.values()]),
    }


def noise() -> Tensor:
    """Released gradients of 12 steps at q = 1."""
    released = Released()
    fit(Silent(lr=0.0), DataLoader(make_dataset(), batch_size=32), [released], max_epochs=12)
    return torch.stack([torch.cat([g.flatten() for g in grads.values()]) for grads in released.grads])


def releases() -> Tensor:
    """What this rank holds of 600 releases of noise of std 1.5: its rows, then what is replicated."""
    module = nn.Module()
    module.network, module.shift = plain(), nn.Parameter(torch.zeros(NUM_CLASSES))
    for layer in (module.network[0], module.network):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    reduction = Shards(module, RANK, 2, torch.device("cpu"))
    accumulator = reduction.make_accumulator(dict(module.named_parameters()), FlatClipping(1.0), 0)
    return releases_of(accumulator, reduction)


def training(*, checked: bool = False) -> dict[str, Any]:
    """5 steps of about 2 records each, in microbatches: ranks draw different numbers of them, and by this seed none."""
    module = Partly(optimizer=torch.optim.Adam, lr=0.05)
    loader = DataLoader(make_dataset(40), batch_size=2)
    strategy = private(microbatch_size=2, check_per_sample=checked, seed=1)
    trainer = fit(module, loader, [EpsilonMonitor()], strategy, max_steps=5)
    weights = whole(dict(module.named_parameters()))
    return {
        "weights": torch.cat([w.flatten() for w in weights.values()]),
        "sizes": module.sizes,
        "steps": (trainer.global_step, trainer.strategy.ledger.num_steps),
        "epsilon": (trainer.strategy.epsilon(), float(trainer.callback_metrics["epsilon"])),
    }


def checked_training() -> dict[str, Any]:
    return training(checked=True)


class FromMeta(Sharded):
    """Makes its network without memory; Lightning gives it some, and calls ``reset_parameters``, once it is sharded."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.network = nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
        super().configure_model()


def meta() -> dict[str, Any]:
    module = FromMeta(optimizer=torch.optim.Adam, lr=0.05)
    trainer = fit(module, DataLoader(make_dataset(), batch_size=8), max_epochs=1)
    weights = whole(dict(module.named_parameters()))
    return {"weights": torch.cat([w.flatten() for w in weights.values()]), "steps": trainer.strategy.ledger.num_steps}


def spoiled() -> dict[str, Any]:
    """One record is NaN: the sum of all others."""
    features, labels = make_dataset().tensors
    features = features.clone()
    features[7] = torch.nan  # drawn by rank 1
    released = Released()
    loader = DataLoader(TensorDataset(features, labels), batch_size=32)
    fit(
        Sharded(plain(), lr=0.0),
        loader,
        [released],
        DPFSDPStrategy(noise_multiplier=0.0, check_per_sample=False),
        max_steps=1,
    )
    return released.grads[0]


def skipped() -> dict[str, Any]:
    loader = DataLoader(make_dataset(), batch_size=8)

    def run(skips: Callable[[int, int], bool]) -> L.Trainer:
        return fit(Skipping(skips), loader, strategy=private(check_per_sample=True), max_epochs=1)

    return {
        "everywhere": run(lambda rank, index: index == 1).strategy.ledger.num_steps,
        "on one rank": said(lambda: run(lambda rank, index: rank == 1 and index == 1)),
    }


def communication() -> dict[str, Any]:
    """Elements that a logical step of three microbatches sends, and the largest memory that its sums take."""
    sent: list[tuple[str, int]] = []  # as a dictionary it would be restored after all microbatches but the last
    names = (
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "all_reduce",
    )
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}  # names differ by version of torch
    accumulators, largest = [], [0]

    class Counting(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                for name, original in originals.items():
                    setattr(dist, name, count(name, original))

        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            accumulators.append(max(acc.num_coordinates for acc in trainer.strategy.accumulators.values()))
            for name, original in originals.items():
                setattr(dist, name, original)

    def count(name: str, original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            kind = name.removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_single")
            sent.append((kind, args[1 if kind == "reduce_scatter" else 0].numel()))
            return original(*args, **kwargs)

        return counted

    collect = PrivateStep.collect

    def watched(self: PrivateStep, optimizer: int = 0) -> None:
        with Largest() as made:
            collect(self, optimizer)
        largest[0] = max(largest[0], made.elements)

    PrivateStep.collect = watched  # type: ignore[method-assign]
    try:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(NUM_FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        loader = DataLoader(make_dataset(), batch_size=32)
        strategy = private(microbatch_size=11)
        fit(Sharded(network, {"reshard_after_forward": True}), loader, [Counting()], strategy, max_steps=3)
    finally:
        PrivateStep.collect = collect  # type: ignore[method-assign]
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    by_kind = {kind: [num for one, num in sent if one == kind] for kind in kinds}
    return {"sent": by_kind, "own": accumulators[-1], "largest": largest[0]}


def main() -> None:
    parts = (
        sums,
        repeated_sums,
        manual,
        noise,
        releases,
        training,
        checked_training,
        meta,
        spoiled,
        skipped,
        communication,
        planned,
        refused,
        saving,
        checked_sums,
        resumed_alone,
    )
    wanted = sys.argv[2:] or [part.__name__ for part in parts[:-2]]
    seen = {part.__name__: part() for part in parts if part.__name__ in wanted}
    seen["folder"] = str(OUT)
    torch.save(seen, OUT / f"{'alone' if DEVICES == 1 else 'rank'}{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
