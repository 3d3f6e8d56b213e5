"""Run by test_ddp.py in two processes: each case trains, and each rank writes down what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp import AdaptiveClipping, CorrelatedNoise, DPDDPStrategy, EpsilonMonitor, RandomSparsification
from lightning_dp.clipping import FlatClipping
from lightning_dp.step.reduction import AllReduce
from tests.helpers import NUM_FEATURES, Classifier, Hidden, Recorder, make_dataset, make_trainer
from tests.strategies.releases import releases_of
from tests.strategies.test_manual import GAN

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])


def fit(
    module: L.LightningModule,
    loader: Any,
    callbacks: Any = (),
    resume: Any = None,
    strategy: Any = None,
    **options: Any,
) -> L.Trainer:
    strategy = strategy or private()
    trainer = make_trainer(strategy, OUT, devices=2, callbacks=list(callbacks), **options)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def private(*, check_per_sample: bool = False, **options: Any) -> DPDDPStrategy:
    """Samples are checked where ranks choose a way, and in the parts ``checked``, which run by themselves."""
    given = {"noise_multiplier": 1.0, "target_delta": 1e-3, **options}
    return DPDDPStrategy(check_per_sample=check_per_sample, **given)


class Nothing(Classifier):
    """No gradient at all: what its optimizer sees is noise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0


class Indexed(Dataset):
    """Its records are their own positions."""

    def __len__(self) -> int:
        return 41

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(NUM_FEATURES), index


class Drawing(Nothing):
    """Keeps the positions that reached it, a list a step."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[list[int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.drawn.append(batch[1].tolist())


class Writing(Drawing):
    """Logs with a collective, as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.logged.append(int(batch[1].sum()))
        self.log("positions", float(batch[1].sum()), sync_dist=True, on_step=True)
        return super().training_step(batch, batch_idx)


class Synced(L.Callback):
    """Keeps the value that was logged in each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["positions"]))


class UnseenOnOne(Classifier):
    """A classifier whose first weight no rule can follow, on rank 0 alone."""

    def forward(self, features: Tensor) -> Tensor:
        network: Any = self.network
        first, rest = network[0], network[1:]
        hidden = Hidden.apply(features, first.weight.mT) if RANK == 0 else features @ first.weight.mT
        out: Tensor = rest(hidden + first.bias)
        return out


class Watch(L.Callback):
    """Keeps the released gradient and count of every step, and what the noise of the gradient should be."""

    def __init__(self) -> None:
        self.noise: list[Tensor] = []
        self.std: list[float] = []
        self.counts: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bound = trainer.strategy.mechanisms.bound
        observe = bound.observe

        def watched(release: Any) -> None:
            self.counts += release.statistics
            self.std.append(release.noise_std)
            observe(release)

        bound.observe = watched

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.noise.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


def releases() -> Tensor:
    """What 600 releases of a masked gradient, of noise of std 1.5, and of two counts, of std 0.5, hold."""
    reduction = AllReduce(RANK, 2, torch.device("cpu"))
    accumulator = reduction.make_accumulator({"weight": nn.Parameter(torch.zeros(60))}, FlatClipping(1.0), 2)
    accumulator.set_masks([{"weight": torch.arange(60) % 2 == 0}], (1,))
    return releases_of(accumulator, reduction, statistics_std=0.5)


def training(*, checked: bool = False) -> dict[str, Any]:
    """20 steps with momentum of Adam, and a resume; replicas start apart on purpose."""
    module = Classifier(optimizer=torch.optim.Adam, lr=0.05)
    with torch.no_grad():
        module.network[0].bias += RANK
    strategy = private(check_per_sample=checked)
    trainer = fit(module, DataLoader(make_dataset(), batch_size=8), [EpsilonMonitor()], strategy=strategy, max_epochs=5)
    seen = {
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]),
        "ledger": trainer.strategy.ledger.state_dict()["entries"],
        "epsilon": trainer.strategy.epsilon(),
    }
    trainer.save_checkpoint(OUT / "five.ckpt")
    trainer = fit(
        Classifier(optimizer=torch.optim.Adam),
        DataLoader(make_dataset(), batch_size=8),
        resume=OUT / "five.ckpt",
        max_epochs=6,
    )
    return {**seen, "resumed": trainer.strategy.ledger.num_steps}


def gan(*, checked: bool = False) -> Tensor:
    """Weights of a public generator next to a private discriminator."""
    module = GAN()
    strategy = DPDDPStrategy(noise_multiplier=1.0, public_optimizers=[0], check_per_sample=checked)
    fit(module, DataLoader(make_dataset(16), batch_size=2), strategy=strategy, max_epochs=1)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def checked() -> dict[str, Any]:
    return {**training(checked=True), "gan": gan(checked=True)}


def unchecked() -> dict[str, Any]:
    seen: dict[str, Any] = {}

    # noise: the reduced gradient, at q = 1 over 12 steps
    recorder = Recorder()
    fit(Nothing(lr=0.0), DataLoader(make_dataset(), batch_size=32), [recorder], max_epochs=12)
    seen["noise"] = torch.stack([torch.cat([g.flatten() for g in s.values()]) for s in recorder.before_step])

    # correlated noise: 12 steps in 3 passes over 4 batches
    recorder = Recorder()
    correlated = CorrelatedNoise(decay=0.8)
    strategy = private(sampling="cyclic", noise=correlated)
    fit(Nothing(lr=0.0), DataLoader(make_dataset(), batch_size=8), [recorder], strategy=strategy, max_epochs=3)
    released = torch.stack([torch.cat([g.flatten() for g in s.values()]) for s in recorder.before_step])
    seen["correlated"] = released * 16 / correlated.sensitivity(12, separation=4, passes=3)

    seen |= training()

    # the sum over ranks, without noise, in microbatches: every record once
    recorder, module = Recorder(), Classifier(lr=0.0)
    strategy = private(noise_multiplier=0.0, max_grad_norm=1.4, microbatch_size=5)
    fit(module, DataLoader(make_dataset(), batch_size=32), [recorder], strategy=strategy, max_epochs=1)
    seen["sum"] = recorder.before_step[0]

    # the same where one rank cannot go by rules: both run one sample at a time
    recorder, module = Recorder(), UnseenOnOne(lr=0.0)
    strategy = DPDDPStrategy(noise_multiplier=0.0, max_grad_norm=1.4)
    fit(module, DataLoader(make_dataset(), batch_size=32), [recorder], strategy=strategy, max_epochs=1)
    seen["alone"] = (strategy.state.runs_alone, recorder.before_step[0])

    # the same for users of 1 and 7 records: each is clipped once, on one rank
    recorder, ids = Recorder(), [2 * (record // 8) + (record % 8 > 0) for record in range(64)]
    strategy = private(noise_multiplier=0.0, max_grad_norm=0.7, microbatch_size=5, unit=ids, records_per_unit=7)
    fit(Classifier(lr=0.0), DataLoader(make_dataset(), batch_size=8), [recorder], strategy=strategy, max_epochs=1)
    seen["users"] = recorder.before_step[0]

    # who is drawn: positions by rank; a batch of one record is often empty on one rank and not on the other; four
    # passes reach the module, and the same loader hands out 76 more
    module = Drawing()
    trainer = fit(module, DataLoader(Indexed(), batch_size=1), max_epochs=4)
    items = [item for _ in range(76) for item in trainer.train_dataloader]
    seen["drawn"] = module.drawn + [[p for _, part in item.microbatches for p in part[1].tolist()] for item in items]

    # how often a logical step talks to the other rank: accumulated parts and microbatches do not
    sizes: list[int] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        sizes.append(tensor.numel()),
        all_reduce(tensor, *args, **kwargs),
    )[1]
    strategy = private(microbatch_size=3)
    trainer = fit(
        Classifier(),
        DataLoader(make_dataset(), batch_size=4),
        strategy=strategy,
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    dist.all_reduce = all_reduce
    seen["reduced"] = (trainer.strategy.ledger.num_steps, sizes.count(53), max(sizes))

    # collectives in the user's logging, while ranks hold different numbers of microbatches
    strategy = private(microbatch_size=2)
    module, synced = Writing(), Synced()
    trainer = fit(module, DataLoader(Indexed(), batch_size=6), [synced], strategy=strategy, max_epochs=4)
    seen["synced"] = {"steps": trainer.strategy.ledger.num_steps, "given": module.logged, "values": synced.values}

    # under a mask and with a counted bound: what the gradient and the count carry, and what they should
    watch, module = Watch(), Drawing()
    callbacks = [RandomSparsification(final_rate=0.5, schedule="constant"), AdaptiveClipping(), watch]
    fit(module, DataLoader(Indexed(), batch_size=2), callbacks, max_epochs=4)
    seen["mixed"] = {"noise": torch.stack(watch.noise), "std": watch.std, "counts": watch.counts}
    seen["mixed"]["sizes"] = [len(positions) for positions in module.drawn]
    seen["releases"] = releases()

    seen["gan"] = gan()
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(checked() if "checked" in sys.argv else unchecked(), OUT / f"rank{RANK}.pt")
