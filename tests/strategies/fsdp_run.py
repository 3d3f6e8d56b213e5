"""Run by test_fsdp.py in two processes: each case trains a sharded module, and each rank writes down what it saw."""

from __future__ import annotations

import os
import shutil
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
from torch.distributed.tensor import Shard
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    CorrelatedNoise,
    DPFSDPStrategy,
    DPStrategy,
    EpsilonMonitor,
    GradientDiagnostics,
    PrivacyAudit,
    PrivacyBudget,
    PrivacyCard,
    PrivacyError,
    TopAgg,
)
from lightning_dp.clipping import FlatClipping
from lightning_dp.step.shards import Shards
from lightning_dp.step.step import PrivateStep
from tests.helpers import NUM_CLASSES, NUM_FEATURES, ByHand, Largest, make_dataset, make_trainer
from tests.strategies.releases import releases_of
from tests.strategies.sharded import CASES, Sharded, plain

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])
#: Cases whose samples are checked, in a run of their own: each network once, but for that of "flat", which ``training``
#: checks, and in each precision; the checks know of nothing else.
CHECKED = ("tied, recomputed", "bfloat16", "weight norm, frozen", "adapter")
#: Processes of a run: 2, but for the one that resumes alone.
DEVICES = 1 if "resumed_alone" in sys.argv else 2


class Released(L.Callback):
    """Keeps the released gradients, whole."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(whole({n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}))


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def private(**options: Any) -> DPFSDPStrategy:
    """Samples are checked in ``checked_sums``, ``training`` and ``skipped`` only: it takes longer than all else."""
    given = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "check_per_sample": False,
        **options,
    }
    return DPFSDPStrategy(**{name: value for name, value in given.items() if value is not None})


def fit(
    module: L.LightningModule,
    loader: Any,
    callbacks: Any = (),
    strategy: Any = None,
    resume: Any = None,
    **options: Any,
) -> L.Trainer:
    options = {"max_epochs": None, "devices": DEVICES, "callbacks": list(callbacks), **options}
    trainer = make_trainer(strategy or private(), OUT, **options)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


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


def said(run: Callable[[], Any]) -> str:
    """What the error of a run says."""
    try:
        run()
    except (PrivacyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sums(names: Iterable[str] = CASES, *, checked: bool = False) -> dict[str, Any]:
    """The sum over ranks, without noise, in every case."""
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


def checked_sums() -> dict[str, Any]:
    return sums(CHECKED, checked=True)


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
    """What this rank holds of 1,000 releases of noise of std 1.5: its rows, then what is replicated."""
    module = nn.Module()
    module.network, module.shift = plain(), nn.Parameter(torch.zeros(NUM_CLASSES))
    for layer in (module.network[0], module.network):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    reduction = Shards(module, RANK, 2, torch.device("cpu"))
    accumulator = reduction.make_accumulator(dict(module.named_parameters()), FlatClipping(1.0), 0)
    return releases_of(accumulator, reduction)


def training() -> dict[str, Any]:
    """5 steps of about 2 records each, in microbatches: ranks draw different numbers of them, and by this seed none."""
    module = Partly(optimizer=torch.optim.Adam, lr=0.05)
    loader = DataLoader(make_dataset(40), batch_size=2)
    strategy = private(microbatch_size=2, check_per_sample=True, seed=1)
    trainer = fit(module, loader, [EpsilonMonitor()], strategy, max_steps=5)
    weights = whole(dict(module.named_parameters()))
    return {
        "weights": torch.cat([w.flatten() for w in weights.values()]),
        "sizes": module.sizes,
        "steps": (trainer.global_step, trainer.strategy.ledger.num_steps),
        "epsilon": (trainer.strategy.epsilon(), float(trainer.callback_metrics["epsilon"])),
    }


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
    sent: dict[str, list[int]] = {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
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
            sent[kind].append(args[1 if kind == "reduce_scatter" else 0].numel())
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
    return {"sent": sent, "own": accumulators[-1], "largest": largest[0]}


def planned() -> dict[str, Any]:
    """A target, a budget and a learned bound, each with its callbacks; the card has no plot: it takes long to load."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    loader = DataLoader(make_dataset(), batch_size=8)
    target = fit(
        Sharded(plain()),
        loader,
        [PrivacyCard(OUT / "card"), SaveFirst()],
        private(noise_multiplier=None, target_epsilon=3.0),
        max_epochs=2,
    )
    budget = fit(Sharded(plain()), loader, [PrivacyBudget(2.5)], max_epochs=50)
    learned, counted, every = AutoThreshold(), AdaptiveClipping(), DataLoader(make_dataset(), batch_size=32)
    fit(Sharded(plain(), lr=0.0), every, [learned], private(noise_multiplier=0.0), max_steps=2)
    fit(Sharded(plain()), loader, [counted], max_epochs=2)
    return {
        "target": target.strategy.epsilon(),
        "statement": target.strategy.privacy_statement(),
        "card": sorted(path.name for path in (OUT / "card").iterdir()),
        "learned": learned.bound.value,
        "counted": counted.bound.value,
        "budget": (budget.strategy.epsilon(), budget.strategy.ledger.num_steps),
    }


def refused() -> dict[str, str]:
    loader = DataLoader(make_dataset(), batch_size=8)

    class Whole(Sharded):
        def configure_model(self) -> None:
            pass

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(make_dataset())

    return {
        "stream": said(lambda: fit(Sharded(plain()), DataLoader(Stream(), batch_size=8), max_steps=2)),
        "no unit": said(lambda: fit(Whole(plain()), loader)),
        "single": said(lambda: fit(Sharded(plain()), loader, strategy=private(microbatch_size=1))),
        "top_agg": said(lambda: fit(Sharded(plain()), loader, strategy=private(clipping=TopAgg(k=3)))),
        "public": said(lambda: fit(Sharded(plain()), loader, strategy=private(public_optimizers=[0]))),
        "canaries": said(lambda: fit(Sharded(plain()), loader, [PrivacyAudit(num_canaries=4)])),
        "diagnostics": said(lambda: fit(Sharded(plain()), loader, [GradientDiagnostics()])),
        "correlated": said(
            lambda: fit(Sharded(plain()), loader, strategy=private(sampling="cyclic", noise=CorrelatedNoise()))
        ),
        "columns": said(lambda: fit(Sharded(even(), {"shard_placement_fn": by_columns}), loader)),
    }


def even() -> nn.Module:
    """A network whose matrices divide by two along both axes."""
    return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.Tanh(), nn.Linear(4, 4))


def by_columns(parameter: nn.Parameter) -> Any:
    """Places a matrix by its columns."""
    return Shard(parameter.dim() - 1)


class SaveFirst(L.Callback):
    """Saves after the first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(OUT / "target.ckpt")


def adam() -> Sharded:
    return Sharded(plain(), optimizer=torch.optim.Adam, lr=0.05)


def saving() -> dict[str, Any]:
    """Two epochs, saved in parts and as a whole, resumed from both; and a folder whose files are of two checkpoints."""
    loader = DataLoader(make_dataset(), batch_size=8)
    module, full = adam(), private(save_distributed_checkpoint=False)
    trainer = fit(module, loader, max_epochs=2)
    trainer.save_checkpoint(OUT / "parts.ckpt")
    fit(adam(), loader, strategy=full, resume=OUT / "parts.ckpt", max_epochs=2).save_checkpoint(OUT / "full.ckpt")
    resumed = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=3)
    resumed.save_checkpoint(OUT / "later.ckpt")
    resumed.save_checkpoint(OUT / "later.ckpt")  # replaces what is there
    if RANK == 0:
        shutil.copytree(OUT / "parts.ckpt", OUT / "mixed.ckpt")
        shutil.copy(OUT / "later.ckpt" / "meta.pt", OUT / "mixed.ckpt" / "meta.pt")
        shutil.copytree(OUT / "later.ckpt", OUT / "parts of two.ckpt")
        shutil.copy(OUT / "parts.ckpt" / "__1_0.distcp", OUT / "parts of two.ckpt" / "__1_0.distcp")
        os.rename(OUT / "parts.ckpt", OUT / "parts.ckpt.old")  # as a death in the middle of a move leaves it
    dist.barrier()
    recovered = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=2)
    return {
        "weights": whole(dict(module.named_parameters())),
        "recovered": whole(dict(recovered.lightning_module.named_parameters())),
        "steps": [each.strategy.ledger.num_steps for each in (trainer, resumed, recovered)],
        "lineages": {each.strategy.ledger.lineage for each in (trainer, resumed, recovered)},
        "from full": fit(adam(), loader, resume=OUT / "full.ckpt", max_epochs=3).strategy.ledger.num_steps,
        "mixed": said(lambda: fit(adam(), loader, resume=OUT / "mixed.ckpt", max_epochs=3)),
        "parts of two": said(lambda: fit(adam(), loader, resume=OUT / "parts of two.ckpt", max_epochs=3)),
        "stateless": stateless(loader),
        "copied": copied(module),
    }


def stateless(loader: Any) -> dict[str, Any]:
    """SGD without momentum, saved as a whole after an epoch and resumed by a module that asks for another rate."""
    first = fit(Sharded(plain(), lr=0.05), loader, strategy=private(save_distributed_checkpoint=False), max_epochs=1)
    first.save_checkpoint(OUT / "sgd.ckpt")
    saved = whole(dict(first.lightning_module.named_parameters()))
    still = fit(Sharded(plain(), lr=0.9), loader, resume=OUT / "sgd.ckpt", max_epochs=1)
    onward = fit(Sharded(plain(), lr=0.9), loader, resume=OUT / "sgd.ckpt", max_epochs=2)
    return {
        "same": all(
            torch.equal(saved[n], w) for n, w in whole(dict(still.lightning_module.named_parameters())).items()
        ),
        "rate": onward.optimizers[0].param_groups[0]["lr"],
        "steps": onward.strategy.ledger.num_steps,
    }


def copied(module: Sharded) -> str:
    """What a run of one process says of a whole copy of weights that were sharded when they were trained."""
    copy = Sharded(plain())
    copy.load_state_dict(whole(module.state_dict()))
    return said(lambda: DPStrategy(noise_multiplier=1.0).state.check_history(copy))


def resumed_alone() -> dict[str, Any]:
    """One process goes on with a checkpoint of two: first no step, then an epoch."""
    loader = DataLoader(make_dataset(), batch_size=16)
    still = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=2)
    weights = whole(dict(still.lightning_module.named_parameters()))
    onward = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=3)
    strategy = private(noise_multiplier=None, target_epsilon=3.0)
    target = fit(
        Sharded(plain()), DataLoader(make_dataset(), batch_size=8), (), strategy, OUT / "target.ckpt", max_epochs=2
    )
    return {
        "weights": weights,
        "steps": onward.strategy.ledger.num_steps,
        "world_size": onward.world_size,
        "target": (target.strategy.epsilon(), [entry.num_steps for entry in target.strategy.ledger.entries]),
    }


def main() -> None:
    parts = (
        sums,
        manual,
        noise,
        releases,
        training,
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
