"""Four small studies on digits, one per claim of "Inference and Interference" (Watson et al. 2023, arXiv 2311.06839).

    python benchmarks/pruning.py                     # all four, about a quarter of an hour of one core
    python benchmarks/pruning.py --studies stages    # one of them; the others stay in the file
    python benchmarks/pruning.py --report            # section and plots from the file, no runs

The claims are those of the abstract; the settings are ours: a perceptron 64-width-10, SGD, epsilon 1 at delta 1e-5.
Ablations need a noise multiplier in place of a target: it is the one that the target would have given. Learning rates
are chosen on validation records with seeds that are not reported.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L

from benchmarks import pruning_report
from benchmarks.choice import choose_and_report
from benchmarks.readme import write_section
from benchmarks.tasks import TASKS, Classifier, Split, accuracy, be_quiet, perceptron, train
from lightning_dp import DPStrategy, MagnitudePruning, SwitchToDP
from lightning_dp.accounting import Ledger, PrivacyEvent, calibrate_noise_multiplier, make_accountant

HERE = Path(__file__).parent
TASK = TASKS["digits"]
EPSILON, DELTA = 1.0, 1e-5
BOUNDS = (1.0, 0.1)
MASKS: dict[str, dict[str, Any]] = {
    "initial magnitude": {},
    "random": {"scores": "random"},
    "initial magnitude, frozen": {"mode": "freeze"},
    "public magnitude": {"source": "public"},
}


@dataclass(frozen=True)
class Scale:
    """Size of the studies.

    Args:
        seeds: how many are reported, counted from 0.
        epochs: of a run.
        grid: learning rates; a single one is not tried.
        widths: of the hidden layer, in the study of dimensions.
        amounts: fractions of the weights removed.
        pruned_width: of the hidden layer that is pruned.
    """

    seeds: int = 5
    epochs: int = TASK.epochs
    grid: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    widths: tuple[int, ...] = (16, 64, 256)
    amounts: tuple[float, ...] = (0.5, 0.9)
    pruned_width: int = 256


SMOKE = Scale(seeds=2, epochs=2, grid=(1.0,), widths=(4, 8), amounts=(0.9,), pruned_width=8)


@dataclass(frozen=True)
class Arm:
    """One variant of training.

    Args:
        options: of ``DPStrategy``; ``None``: plain SGD.
        width: of the hidden layer.
        callbacks: seed -> callbacks of the Trainer.
    """

    options: dict[str, Any] | None
    width: int = 64
    callbacks: Callable[[int], list[L.Callback]] = field(default=lambda seed: [])

    @property
    def network(self) -> Callable[[], Any]:
        """Make the module."""
        return functools.partial(perceptron, 64, self.width, 10)

    def run(self, lr: float, seed: int, split: Split, epochs: int, *extra: L.Callback) -> Classifier:
        """Train once."""
        module = Classifier(self.network, lr=lr, seed=seed)
        strategy = None if self.options is None else DPStrategy(target_delta=DELTA, **self.options)
        train(TASK, module, split.train, strategy=strategy, callbacks=[*self.callbacks(seed), *extra], epochs=epochs)
        return module


class Curve(L.Callback):
    """Test accuracy after every epoch."""

    def __init__(self, split: Split) -> None:
        self.split, self.values = split, list[float]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.values.append(round(accuracy(pl_module, self.split.held_out), 4))


@functools.cache
def noise_multiplier() -> float:
    """Return the noise to which ``target_epsilon`` would calibrate on the whole training split."""
    size = len(TASK.for_report.train)
    steps = TASK.epochs * round(size / TASK.batch_size)
    return calibrate_noise_multiplier(
        target_epsilon=EPSILON,
        delta=DELTA,
        accountant=make_accountant("pld"),
        runs=lambda sigma: [(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=TASK.batch_size / size), steps)],
        history=Ledger(),
    )


def ablations(bound: float) -> dict[str, dict[str, Any] | None]:
    """Return options of ``DPStrategy`` for the four combinations of clipping and noise."""
    sigma = noise_multiplier()
    return {
        "neither": None,
        "clip only": {"noise_multiplier": 0.0, "max_grad_norm": bound},
        "noise only": {"noise_multiplier": sigma, "max_grad_norm": bound, "clipping": "none"},
        "both": {"noise_multiplier": sigma, "max_grad_norm": bound},
    }


def stages(scale: Scale) -> dict[str, Any]:
    """Run claim 1: SGD and DP-SGD, each for one half of the run, all at the rate that is best for DP-SGD."""
    half = scale.epochs // 2
    private = ablations(1.0)["both"]
    arms = {
        "DP-SGD": Arm(private),
        "SGD": Arm(None),
        "SGD, then DP-SGD": Arm(private, callbacks=lambda seed: [SwitchToDP(half)]),
        "DP-SGD, then SGD": Arm(private, callbacks=lambda seed: [SwitchToDP(half, reverse=True)]),
    }
    rate = measure(arms["DP-SGD"], replace(scale, seeds=0))["lr"]
    results: dict[str, Any] = {"half": half, "early": max(1, scale.epochs // 10), "lr": rate, "arms": {}}
    for name, arm in arms.items():

        def curve(lr: float, seed: int, split: Split, arm: Arm = arm) -> list[float]:
            seen = Curve(split)
            arm.run(lr, seed, split, scale.epochs, seen)
            return seen.values

        results["arms"][name] = chosen(curve, replace(scale, grid=(rate,)))["report"]
    return results


def parts(scale: Scale) -> dict[str, Any]:
    """Run claim 2: clipping only, noise only, both, neither, at two bounds."""
    results: dict[str, Any] = {"neither": measure(Arm(None), scale)}
    for bound in BOUNDS:
        # a step under clipping is in proportion to the bound
        clipped = replace(scale, grid=tuple(rate / bound for rate in scale.grid))
        for name, options in ablations(bound).items():
            if options is not None:
                own = scale if "clipping" in options else clipped
                results[f"{name}, bound {bound:g}"] = measure(Arm(options), own)
    return results


def dimensions(scale: Scale) -> dict[str, Any]:
    """Run claim 3: the same at several widths."""
    arms = ablations(1.0).items()
    return {f"{w}": {name: measure(Arm(options, w), scale) for name, options in arms} for w in scale.widths}


def masks(scale: Scale) -> dict[str, Any]:
    """Run claim 4: DP-SGD under target_epsilon with some of the weights removed, by kind of mask and amount.

    The validation records count as public here: they decide on rates, make the weights of the public masks, and are not
    among the private records that any of these runs trains on.
    """
    private = Split(TASK.for_choice.train, TASK.for_report.held_out)
    options, width = {"target_epsilon": EPSILON}, scale.pruned_width
    results: dict[str, Any] = {"width": width, "dense": measure(Arm(options, width), scale, private)}
    for kind, settings in MASKS.items():
        arms = {
            amount: Arm(options, width, functools.partial(_pruning, amount, settings, width))
            for amount in scale.amounts
        }
        results[kind] = {f"{amount:g}": measure(arm, scale, private) for amount, arm in arms.items()}
    return results


def _pruning(amount: float, settings: dict[str, Any], width: int, seed: int) -> list[L.Callback]:
    extra: dict[str, Any] = {}
    if settings.get("source") == "public":
        extra["reference"] = _public_weights(width, seed)
    if settings.get("scores") == "random":
        extra["seed"] = seed
    return [MagnitudePruning(amount, **settings, **extra)]


@functools.cache
def _public_weights(width: int, seed: int) -> dict[str, Any]:
    """Return weights trained without privacy on the public records, from the run's own initial weights."""
    public = TASK.for_choice.held_out
    module = Arm(None, width).run(0.5, seed, Split(public, public), TASK.epochs)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def measure(arm: Arm, scale: Scale, report: Split | None = None) -> dict[str, Any]:
    """Return the accuracy of one variant at its best rate."""

    def run(lr: float, seed: int, split: Split) -> float:
        return round(accuracy(arm.run(lr, seed, split, scale.epochs), split.held_out), 4)

    return chosen(run, scale, report)


def chosen(run: Callable[[float, int, Split], Any], scale: Scale, report: Split | None = None) -> dict[str, Any]:
    """Return the reported values of a run at its best rate; see ``choose_and_report``."""
    return choose_and_report(
        run, choice=TASK.for_choice, report=report or TASK.for_report, grid=scale.grid, seeds=scale.seeds
    )


STUDIES: dict[str, Callable[[Scale], dict[str, Any]]] = {
    "stages": stages,
    "parts": parts,
    "dimensions": dimensions,
    "masks": masks,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=Scale.seeds, help="how many are reported, counted from 0")
    parser.add_argument("--smoke", action="store_true", help="the smallest runs of everything")
    parser.add_argument("--report", action="store_true", help="no runs: section and plots from the file")
    parser.add_argument("--out", type=Path, default=HERE / "pruning.json")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    options = parser.parse_args(arguments)
    be_quiet()
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    scale = SMOKE if options.smoke else Scale(seeds=options.seeds)
    for name in [] if options.report else options.studies:
        began = time.monotonic()
        results[name] = STUDIES[name](scale)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    pruning_report.plot(results, options.out.parent)
    write_section("pruning", pruning_report.section(results), readme=options.readme)


if __name__ == "__main__":
    main()
