"""Two processes on one machine: each draws from its own half of the data, one all-reduce per step adds their sums.

    python examples/two_processes.py            # about half a minute
    python examples/two_processes.py --smoke    # two epochs

``batch_size`` is that of one process, as everywhere in Lightning: with two of them a logical batch has twice as many
records on average, and so epsilon is that of one process with twice the batch size. Each adds a half of the noise's
variance.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning as L
import torch
from digits import Classifier, Digits

from lightning_dp import DPDDPStrategy, DPStrategy

SETTINGS = {"noise_multiplier": 3.0, "target_delta": 1e-5}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class SameWeights(L.Callback):
    """Compares the replicas at the end of every epoch: they saw other records and the same steps."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mine = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        of_both = trainer.strategy.all_gather(mine)
        assert of_both.shape[0] == trainer.world_size == 2
        assert torch.equal(of_both[0], of_both[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # the test set is whole in the sum of the metric's states
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    epochs = 2 if options.smoke else options.epochs

    # the script is started a second time for the second process: everything below runs in both
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=2,
        strategy=DPDDPStrategy(process_group_backend="gloo", **SETTINGS),
        callbacks=[SameWeights()],
        **QUIET,
    )
    trainer.fit(Classifier(), datamodule=Digits(batch_size=128))
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    torch.distributed.destroy_process_group()
    if not trainer.is_global_zero:
        return

    alone = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, strategy=DPStrategy(**SETTINGS), **QUIET)
    alone.fit(Classifier(), datamodule=Digits(batch_size=256))
    print(trainer.strategy.privacy_statement())
    print(f"test accuracy {accuracy:.3f} with two processes, {float(alone.callback_metrics['val_accuracy']):.3f} alone")
    assert trainer.strategy.plan.expected_batch_size == alone.strategy.plan.expected_batch_size == 256
    assert trainer.strategy.ledger.entries == alone.strategy.ledger.entries
    assert trainer.strategy.epsilon() == alone.strategy.epsilon()
    assert accuracy >= (0.2 if options.smoke else 0.8), f"Expected a higher test accuracy, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
