"""A module whose parameters are sharded over two processes: ``configure_model`` shards it, the strategy does the rest.

    python examples/fsdp.py            # about a minute
    python examples/fsdp.py --smoke    # two epochs

Each process holds half of every weight, of the optimizer's state and of the noise. It gathers one block at a time,
clips its own samples, and hands out the sum of a block at once. The checkpoint is a folder with a part of each process.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from digits import Classifier, Digits
from torch.distributed.fsdp import fully_shard

from lightning_dp import DPFSDPStrategy, EpsilonMonitor

SETTINGS = {"noise_multiplier": 3.0, "target_delta": 1e-5}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}


class Sharded(Classifier):
    """The classifier of digits.py, and how it is sharded: as for Lightning's ``ModelParallelStrategy``."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def trainer_of(epochs: int) -> L.Trainer:
    strategy = DPFSDPStrategy(process_group_backend="gloo", **SETTINGS)
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, strategy=strategy, callbacks=[EpsilonMonitor()], **QUIET
    )


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
    first = trainer_of(epochs - 1)
    first.fit(Sharded(), datamodule=Digits(batch_size=128))
    weight = first.lightning_module.net[0].weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]  # a half of it
    path = Path(first.strategy.broadcast(tempfile.mkdtemp())) / "digits.ckpt"
    first.save_checkpoint(path)
    assert (path / "meta.pt").exists()

    second = trainer_of(epochs)
    second.fit(Sharded(), datamodule=Digits(batch_size=128), ckpt_path=path, weights_only=True)
    accuracy = float(second.callback_metrics["val_accuracy"])
    assert second.strategy.ledger.num_steps == second.global_step
    assert second.strategy.epsilon() > first.strategy.epsilon()
    torch.distributed.destroy_process_group()
    if second.is_global_zero:
        print(second.strategy.privacy_statement())
        print(f"test accuracy {accuracy:.3f} with two processes, resumed after {epochs - 1} of {epochs} epochs")
        assert accuracy >= (0.2 if options.smoke else 0.8), f"Expected a higher test accuracy, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
