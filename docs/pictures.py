"""Draws the pictures of docs/callbacks.md from real runs on scikit-learn's 8x8 digits: ``python docs/pictures.py``."""

from __future__ import annotations

import csv
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import matplotlib
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    DPStrategy,
    EpsilonMonitor,
    GradientDiagnostics,
    MagnitudePruning,
    NoiseScheduler,
    PrivacyAudit,
    PrivacyBudget,
    PrivacyCard,
    RandomSparsification,
    SwitchToDP,
    schedules,
)

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))
matplotlib.use("Agg")

from digits import Classifier, Digits  # noqa: E402  an example, found by the line above
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

EPOCHS, STEPS = 20, 6  # steps an epoch: 1437 records, 256 a batch
Curve = tuple[list[int], list[float]]


class Run:
    """One training run on the digits, with everything it logged."""

    def __init__(self, *callbacks: L.Callback, max_epochs: int = EPOCHS, **settings: object) -> None:
        options = {"target_epsilon": 1.0, "target_delta": 1e-5, **settings}
        if "noise_multiplier" in settings:
            del options["target_epsilon"]
        self.module = Classifier()
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                max_epochs=max_epochs,
                strategy=DPStrategy(**options),
                callbacks=[EpsilonMonitor(every_n_steps=1), *callbacks],
                accelerator="cpu",
                logger=CSVLogger(folder),
                log_every_n_steps=1,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            trainer.fit(self.module, datamodule=Digits())
            self.rows = list(csv.DictReader((Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()))

    def curve(self, key: str) -> Curve:
        """Return steps and values of one logged figure."""
        points = [(int(row["step"]), float(row[key])) for row in self.rows if row.get(key)]
        steps, values = zip(*points, strict=True)
        return list(steps), list(values)


def panel(axes: Axes, title: str, curves: dict[str, Curve], *, steps: bool = False) -> None:
    """Curves over the steps, with a legend where there are several."""
    for label, (x, y) in curves.items():
        axes.plot(x, y, label=label, drawstyle="steps-post" if steps else "default")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("logical step")
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(fontsize=8)


def budget(left: Axes, right: Axes) -> None:
    """EpsilonMonitor and PrivacyBudget: what is spent, and where it stops."""
    run = Run(PrivacyBudget(0.8), noise_multiplier=6.0)
    panel(left, "epsilon (EpsilonMonitor), budget 0.8 (PrivacyBudget)", {"epsilon": run.curve("epsilon")})
    left.axhline(0.8, color="black", linestyle=":")
    left.set_xlim(0, STEPS * EPOCHS)
    panel(right, "test accuracy of the run that stops there", {"accuracy": run.curve("val_accuracy")})
    right.set_xlim(0, STEPS * EPOCHS)


def noise(left: Axes, right: Axes) -> None:
    """NoiseScheduler: sigma and epsilon of schedules that all end at epsilon 1."""
    kinds = {
        "constant": Run(),
        "step, 0.9": Run(NoiseScheduler("step", factor=0.9, every_n_epochs=5)),
        "linear to 0.6": Run(NoiseScheduler("linear", factor=0.6)),
        "cosine to 0.6": Run(NoiseScheduler("cosine", factor=0.6)),
    }
    sigmas = {name: run.curve("privacy/noise_multiplier") for name, run in kinds.items()}
    panel(left, "noise multiplier, calibrated to epsilon 1", sigmas, steps=True)
    panel(right, "epsilon", {name: run.curve("epsilon") for name, run in kinds.items()})


def sparsification(left: Axes, right: Axes) -> None:
    """RandomSparsification: what is left out, and what is sent."""
    run = Run(RandomSparsification(final_rate=0.9))
    panel(left, "fraction left out", {"rate": run.curve("privacy/sparsification_rate")}, steps=True)
    panel(right, "bytes one rank sends a step", {"bytes": run.curve("communication/bytes_per_step")}, steps=True)


def threshold(left: Axes, right: Axes) -> None:
    """ClippingScheduler, AutoThreshold, AdaptiveClipping: three ways to move the bound."""
    runs = {
        "ClippingScheduler, step 0.7": Run(ClippingScheduler("step", factor=0.7, every_n_epochs=5)),
        "AutoThreshold": Run(AutoThreshold(minimum=0.5), noise_multiplier=1.0),
        "AdaptiveClipping, median": Run(AdaptiveClipping(quantile=0.5, maximum=3.0)),
    }
    learned = {name: run.curve("privacy/max_grad_norm") for name, run in runs.items() if "Scheduler" not in name}
    steps, factor = list(range(STEPS * EPOCHS)), schedules.step(factor=0.7, every=5 * STEPS)
    panel(left, "clipping bound C", {"ClippingScheduler, step 0.7": (steps, [*map(factor, steps)]), **learned})
    panel(right, "test accuracy", {name: run.curve("val_accuracy") for name, run in runs.items()})


def pruning(left: Axes, right: Axes) -> None:
    """MagnitudePruning: the weights of the first layer after private training."""
    for axes, mode in ((left, "prune"), (right, "freeze")):
        run = Run(MagnitudePruning(0.8, mode=mode))
        weights = run.module.net[0].weight.detach().numpy()
        axes.hist(weights.flatten(), bins=60, log=True)
        axes.set_title(f'weights of the first layer, 80 % removed, mode="{mode}"', fontsize=10)
        axes.set_xlabel("value")


def diagnostics(left: Axes, right: Axes) -> None:
    """GradientDiagnostics: un-noised figures, for study."""
    run = Run(GradientDiagnostics())
    names = "clip_fraction", "clipping_bias"
    panel(left, "nonprivate/clip_fraction, clipping_bias", {name: run.curve(f"nonprivate/{name}") for name in names})
    panel(right, "nonprivate/noise_to_signal", {"ratio": run.curve("nonprivate/noise_to_signal")})


def audit(left: Axes, right: Axes) -> None:
    """PrivacyAudit: what is claimed, and what an attack proves, over the noise; and what canaries cost."""
    sigmas, claims, bounds, accuracies = (0.7, 1.0, 2.0, 4.0), [], [], []
    for sigma in sigmas:
        watch = PrivacyAudit(num_canaries=1000)
        run = Run(watch, noise_multiplier=sigma, max_epochs=5)
        claims.append(watch.result.claimed_epsilon)
        bounds.append(watch.result.epsilon_lower)
        accuracies.append(run.curve("val_accuracy")[1][-1])
    left.plot(sigmas, claims, "o-", label="claimed")
    left.plot(sigmas, bounds, "s-", label="lower bound, confidence 0.95")
    left.set_title("epsilon of 5 epochs", fontsize=10)
    left.set_yscale("symlog", linthresh=0.1)
    left.legend(fontsize=8)
    right.plot(sigmas, accuracies, "o-")
    right.set_title("test accuracy with 1000 canaries among 1437 records", fontsize=10)
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("noise multiplier")


def card() -> None:
    """PrivacyCard: the plot it writes at the end of a run with decaying noise."""
    with tempfile.TemporaryDirectory() as folder:
        Run(PrivacyCard(folder), NoiseScheduler("step", factor=0.8, every_n_epochs=5))
        lines = (Path(folder) / "privacy_card.svg").read_text().splitlines()
        (DOCS / "pictures" / "card.svg").write_text("\n".join(x for x in lines if "dc:date" not in x) + "\n")


def switch(left: Axes, right: Axes) -> None:
    """SwitchToDP: plain and private phases; epsilon is infinite for both."""
    settings = {"noise_multiplier": 10.0}
    runs = {
        "private from epoch 10": Run(SwitchToDP(10), **settings),
        "private until epoch 10": Run(SwitchToDP(10, reverse=True), **settings),
        "private": Run(**settings),
    }
    panel(
        left,
        "test accuracy (epsilon infinite for the first two)",
        {n: r.curve("val_accuracy") for n, r in runs.items()},
    )
    panel(right, "epsilon of the private run", {"epsilon": runs["private"].curve("epsilon")})


PICTURES: tuple[Callable[[Axes, Axes], None], ...] = (
    budget, noise, sparsification, threshold, pruning, diagnostics, audit, switch,
)  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    (DOCS / "pictures").mkdir(exist_ok=True)
    chosen = sys.argv[1:] or ["card", *(draw.__name__ for draw in PICTURES)]
    if "card" in chosen:
        card()
    for draw in PICTURES:
        if draw.__name__ in chosen:
            L.seed_everything(0, verbose=False)  # weights only
            figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
            draw(left, right)
            figure.savefig(DOCS / "pictures" / f"{draw.__name__}.png", dpi=100)
            plt.close(figure)


if __name__ == "__main__":
    main()
