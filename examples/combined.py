"""Three methods in one run: random sparsification, decaying noise and automatic clipping, on 8x8 digits at epsilon 1.

    python examples/combined.py            # about half a minute
    python examples/combined.py --smoke    # one short run

- ``clipping="automatic"`` (AUTO-S) scales every sample's gradient to a norm below 1: no threshold to choose.
- ``NoiseScheduler`` lowers the noise in four plateaus; ``target_epsilon`` is calibrated over the whole schedule.
- ``RandomSparsification`` leaves more and more random coordinates out, and with them their noise.

Each is one line in the Trainer; the ledger takes all of them into account. Differences in accuracy below 0.02 are
noise.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import warnings
from pathlib import Path

import lightning as L
from digits import Classifier, Digits
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DPStrategy, EpsilonMonitor, NoiseScheduler, RandomSparsification

OUT = Path(__file__).parent / "out" / "combined"
EPSILON = 1.0


def train(name: str, seed: int, max_epochs: int, clipping: str, lr: float, callbacks: list[L.Callback]) -> float:
    """Trains one model, prints its statement and returns its test accuracy in the last epoch."""
    L.seed_everything(seed, verbose=False)  # weights only: the noise cannot be seeded this way
    strategy = DPStrategy(target_epsilon=EPSILON, target_delta=1e-5, clipping=clipping)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        strategy=strategy,
        callbacks=[EpsilonMonitor(every_n_steps=1), *callbacks],
        accelerator="cpu",
        logger=CSVLogger(OUT, name=name, version=f"seed_{seed}"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(lr=lr), datamodule=Digits())
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"{name}, seed {seed}: test accuracy {accuracy:.3f}\n{strategy.privacy_statement()}\n")
    assert 0.97 * EPSILON < strategy.epsilon() <= EPSILON
    return accuracy


def column(name: str, key: str) -> list[float]:
    """The logged values of one figure in the run with seed 0."""
    rows = csv.DictReader((OUT / name / "seed_0" / "metrics.csv").read_text().splitlines())
    return [float(row[key]) for row in rows if row.get(key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs of each")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="one run of eight epochs each")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(does not have many workers|exists and is not empty).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    seeds, epochs = (1, 8) if options.smoke else (options.seeds, options.epochs)

    plain, combined = [], []
    for seed in range(seeds):
        plain.append(train("plain", seed, epochs, "flat", 1.0, []))
        methods = [RandomSparsification(final_rate=0.5), NoiseScheduler("step", factor=0.9, every_n_epochs=epochs // 4)]
        combined.append(train("combined", seed, epochs, "automatic", 1.0, methods))

    sigmas, rates = column("combined", "privacy/noise_multiplier"), column("combined", "privacy/sparsification_rate")
    assert len(set(column("plain", "privacy/noise_multiplier"))) == 1
    assert len(set(sigmas)) == 4
    assert abs(sigmas[-1] / sigmas[0] - 0.9**3) < 1e-6
    assert rates[0] == 0.0
    assert abs(rates[-1] - 0.5) < 1e-3
    medians = statistics.median(plain), statistics.median(combined)
    print(f"median test accuracy at epsilon {EPSILON:g}: plain {medians[0]:.3f}, combined {medians[1]:.3f}")
    least = 0.4 if options.smoke else 0.86
    assert min(medians) >= least, f"Expected medians of at least {least}, got {medians}."


if __name__ == "__main__":
    main()
