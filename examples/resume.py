"""A run that is interrupted and goes on: epsilon is that of the run without the interruption.

    python examples/resume.py            # about 10 seconds
    python examples/resume.py --smoke    # fewer epochs

The ledger is part of every checkpoint. Resuming reads it, so steps taken before the crash stay paid; the noise
generator is not in it, since noise used twice would cancel out. The steps between the checkpoint and the crash were
never released (their weights are gone); had you published anything made from them, they would have to be paid too.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from digits import Classifier, Digits
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dp import DPStrategy, EpsilonMonitor, NoiseScheduler

OUT = Path(__file__).parent / "out" / "resume"


class PowerCut(L.Callback):
    """Fails in the middle of an epoch."""

    def __init__(self, after_steps: int) -> None:
        self.after_steps = after_steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after_steps:
            raise RuntimeError("the lights went out")


def make_trainer(max_epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A private Trainer with its checkpoints, the same for every run."""
    return L.Trainer(
        max_epochs=max_epochs,
        strategy=DPStrategy(noise_multiplier=4.0, target_delta=1e-5),
        callbacks=[EpsilonMonitor(), NoiseScheduler("step", factor=0.9, every_n_epochs=2), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="four epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(does not have many workers|callbacks used to create the checkpoint).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    epochs = 4 if options.smoke else options.epochs
    shutil.rmtree(OUT, ignore_errors=True)

    whole = make_trainer(epochs)
    whole.fit(Classifier(), datamodule=Digits())
    steps_per_epoch = whole.global_step // epochs

    saving = ModelCheckpoint(OUT, filename="{step}-{epsilon:.3f}", every_n_train_steps=3, save_top_k=-1)
    crashed = make_trainer(epochs, saving, PowerCut(after_steps=epochs * steps_per_epoch // 2 + 1))
    try:
        crashed.fit(Classifier(), datamodule=Digits())
    except RuntimeError as error:
        print(f"after {crashed.global_step} of {whole.global_step} steps {error}")
    latest = max(OUT.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    print(f"going on from {latest.name}")

    resumed = make_trainer(epochs)
    resumed.fit(Classifier(), datamodule=Digits(), ckpt_path=latest, weights_only=False)
    print(resumed.strategy.privacy_statement())

    assert 0 < crashed.global_step < whole.global_step == resumed.global_step
    assert resumed.strategy.ledger.num_steps == whole.strategy.ledger.num_steps
    assert resumed.strategy.ledger.entries == whole.strategy.ledger.entries
    assert resumed.strategy.epsilon() == whole.strategy.epsilon()
    print(f"epsilon without and with the crash: {whole.strategy.epsilon():.4f}, {resumed.strategy.epsilon():.4f}")


if __name__ == "__main__":
    main()
