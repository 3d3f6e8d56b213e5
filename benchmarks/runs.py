"""Training runs on real data as lines of a JSON file: each is described, run once, and skipped on resume.

A line holds the description of a run and what it gave: accuracy, epsilon by two accountants, seconds, machine, commit.
A queue does the runs missing from the file, in its order, until its time budget is used; a second call does the rest.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.averages import Averages, accuracy
from benchmarks.images import NETWORKS, split_of
from benchmarks.stats import Mean, mean_of
from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    CorrelatedNoise,
    DPStrategy,
    MagnitudePruning,
    NoiseScheduler,
    PerLayerClipping,
    RandomSparsification,
    SwitchToDP,
    TopAgg,
)
from lightning_dp.accounting import make_accountant
from lightning_dp.clipping import Clipping

DELTA = 1e-5
#: Samples on the device at once, for convolutions and for other networks; results do not depend on it.
MICROBATCH = {True: 512, False: 2048}
#: Callbacks of a run by name; the name's last word is the number that they take.
CALLBACKS: dict[str, Callable[[str, int], L.Callback]] = {
    "sparse": lambda value, seed: RandomSparsification(float(value), seed=seed),
    "prune": lambda value, seed: MagnitudePruning(float(value)),
    "prune each layer": lambda value, seed: MagnitudePruning(float(value), scope="layer"),
    "random mask": lambda value, seed: MagnitudePruning(float(value), scores="random", seed=seed),
    "noise step": lambda value, seed: NoiseScheduler("step", factor=float(value), every_n_epochs=3),
    "noise linear": lambda value, seed: NoiseScheduler("linear", factor=float(value)),
    "noise time": lambda value, seed: NoiseScheduler("time", rate=float(value)),
    "noise exponential": lambda value, seed: NoiseScheduler("exponential", rate=float(value)),
    "auto threshold": lambda value, seed: AutoThreshold(float(value)),
    "quantile": lambda value, seed: AdaptiveClipping(float(value)),
    "private from": lambda value, seed: SwitchToDP(int(value.split("x")[0])),
    "private until": lambda value, seed: SwitchToDP(int(value.split("x")[0]), reverse=True),
}

#: Noise multipliers that a target epsilon has led to in this process, by what they depend on.
_calibrated: dict[tuple[Any, ...], float] = {}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        data: name of the data set.
        network: key of ``NETWORKS``.
        epochs: passes over the training records in expectation.
        batch: expected number of records per step.
        lr: learning rate of SGD.
        sigma: noise multiplier; or
        epsilon: what sigma is calibrated to; neither trains without privacy.
        clip: bound on the norm of one record's gradient.
        clipping: of ``DPStrategy``; or "equal" or "least", the noise of ``PerLayerClipping``; or "top" and the share of
            coordinates that ``TopAgg`` keeps.
        momentum: of SGD.
        decay: whether the rate falls to nothing in a straight line.
        method: key of ``CALLBACKS`` and a number; "x16" after an epoch of "private from" or "private until" multiplies
            the rate of the private epochs by 16.
        report: judged on the test split, else on the validation records.
        seed: of weights and masks; sampling and noise are not seeded.
        sampling: of ``DPStrategy``.
        correlated: whether noise is correlated between steps, with ``decay="auto"``.
        average: whether averages of the weights are judged as well.
    """

    data: str
    network: str
    epochs: int
    batch: int
    lr: float
    sigma: float | None = None
    epsilon: float | None = None
    clip: float = 1.0
    clipping: str = "flat"
    momentum: float = 0.0
    decay: bool = False
    method: str = ""
    report: bool = False
    seed: int = field(default=0)
    sampling: str = "poisson"
    correlated: bool = False
    average: bool = False

    def but(self, **changes: Any) -> Run:
        """Return the same run with other values."""
        return Run(**{**asdict(self), **changes})


class Model(L.LightningModule):
    """A network, cross-entropy and SGD.

    Args:
        run: its description.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(run.seed)  # weights only
        self.net, self.run = NETWORKS[run.network](), run

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.run.lr, momentum=self.run.momentum)
        name, _, value = self.run.method.rpartition(" ")
        if name.startswith("private") and "x" in value:
            at, factor = (int(part) for part in value.split("x"))
            private = {"private from": lambda epoch: epoch >= at, "private until": lambda epoch: epoch < at}[name]
            return [optimizer], [
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: factor if private(epoch) else 1)
            ]
        if not self.run.decay:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def clipping_of(run: Run) -> str | Clipping:
    """Return the clipping that a run names."""
    if run.clipping in ("equal", "least"):
        return PerLayerClipping(run.clip, noise=run.clipping)
    return TopAgg(float(run.clipping.split()[1])) if run.clipping.startswith("top ") else run.clipping


def commit() -> str:
    """Return the short name of the checkout's commit, with a plus if Python files of the benchmarks differ from it."""
    here = Path(__file__).parent
    name = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "*.py"], cwd=here, capture_output=True, text=True).stdout
    return name + ("+" if changed.strip() else "")


def machine() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} thread(s)"


def execute(run: Run) -> dict[str, Any]:
    """Train once and judge once, after the last epoch.

    Returns:
        ``accuracy``, ``averages`` by decay where asked for, ``epsilon`` by accountant at delta 1e-5, ``sigma``,
        ``steps``, ``seconds`` of wall clock and of the processor.
    """
    began, work = time.perf_counter(), time.process_time()
    split, strategy = split_of(run.data, report=run.report), None
    known = (run.epsilon, run.epochs, run.batch, len(split.train), run.method, run.sampling, run.correlated)
    sigma = run.sigma if run.epsilon is None else _calibrated.get(known)
    if sigma is not None or run.epsilon is not None:
        noise = {"target_epsilon": run.epsilon} if sigma is None else {"noise_multiplier": sigma}
        strategy = DPStrategy(
            target_delta=DELTA,
            max_grad_norm=run.clip,
            clipping=clipping_of(run),
            microbatch_size=MICROBATCH["cnn" in run.network],
            sampling=run.sampling,
            noise=CorrelatedNoise() if run.correlated else None,
            **noise,
        )
    module, (name, _, value) = Model(run), run.method.rpartition(" ")
    averages = Averages() if run.average else None
    trainer = L.Trainer(
        max_epochs=run.epochs,
        strategy=strategy or "auto",
        callbacks=([CALLBACKS[name](value, run.seed)] if name else []) + ([averages] if averages else []),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(split.train, batch_size=run.batch, shuffle=True))
    epsilons = {}
    if strategy is not None:
        if run.epsilon is not None:
            _calibrated[known] = strategy.plan.noise_multiplier
        epsilons = {name: make_accountant(name).epsilon_or_inf(strategy.ledger, DELTA) for name in ("pld", "rdp")}
    return {
        "accuracy": accuracy(module.net, split.held_out),
        **({"averages": averages.accuracies(module, module.net, split.held_out)} if averages else {}),
        "epsilon": {name: round(value, 4) if math.isfinite(value) else "inf" for name, value in epsilons.items()},
        "sigma": strategy.plan.noise_multiplier if strategy else None,
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - work, 1),
    }


class Results:
    """The lines of a JSON-lines file, which is created with the first one, found by the description of their run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.lines: dict[Run, dict[str, Any]] = {Run(**line["run"]): line for line in lines}

    def add(self, run: Run, outcome: dict[str, Any]) -> None:
        """Append a finished run."""
        known = {"machine": machine(), "commit": commit(), "day": time.strftime("%Y-%m-%d")}
        line = {"run": asdict(run), **outcome, **known}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[run] = line

    def accuracies(self, run: Run, seeds: Iterable[int]) -> dict[str, float]:
        """Return accuracy by seed, for the seeds in the file."""
        found = {seed: self.lines.get(run.but(seed=seed)) for seed in seeds}
        return {str(seed): line["accuracy"] for seed, line in found.items() if line is not None}

    def mean(self, run: Run, seeds: Iterable[int]) -> Mean | None:
        """Return the mean accuracy over the seeds in the file; None without any."""
        values = self.accuracies(run, seeds)
        return mean_of(values.values()) if values else None

    def best(self, runs: Iterable[Run], seeds: Iterable[int]) -> Run | None:
        """Return the run with the best mean accuracy on the validation records; None while one of them is missing."""
        means = {run: self.mean(run, seeds) for run in runs}
        if any(mean is None for mean in means.values()):
            return None
        return max(means, key=lambda run: means[run].value)  # type: ignore[union-attr]

    def fill(self, runs: Iterable[Run], *, until: float = math.inf) -> bool:
        """Run all missing runs in order, but start none after ``until`` (Unix time); return True if none is missing."""
        for run in (run for run in runs if run not in self.lines):
            if time.time() > until:
                return False
            self.add(run, execute(run))
            line = self.lines[run]
            print(f"{time.strftime('%H:%M:%S')} {line['accuracy']:.4f} {line['seconds']:.0f} s {run}", flush=True)
        return True
