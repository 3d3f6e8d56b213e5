"""Run by test_lost_rank.py in two processes; one of them dies within a step."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils.data import DataLoader

from lightning_dp import DPDDPStrategy, DPFSDPStrategy
from tests.helpers import make_dataset, make_trainer
from tests.strategies.sharded import Sharded, plain

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT, VICTIM, HOW, IS_SHARDED = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "sharded"


class Dying(Sharded):
    """Its third step is the last of one rank. Until then, ranks wait 30 seconds for each other, which one may need to
    start; from there on 5.
    """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.strategy.ledger.num_steps == 2:
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=5))
        if RANK == VICTIM and self.trainer.strategy.ledger.num_steps == 2:
            os.kill(os.getpid(), signal.SIGKILL if HOW == "killed" else signal.SIGSTOP)


def main() -> None:
    (OUT / f"pid{RANK}").write_text(str(os.getpid()))
    kind = DPFSDPStrategy if IS_SHARDED else DPDDPStrategy
    strategy = kind(
        noise_multiplier=1.0,
        target_delta=1e-3,
        process_group_backend="gloo",
        timeout=timedelta(seconds=30),
    )
    trainer = make_trainer(strategy, OUT, devices=2, max_epochs=50)
    try:
        trainer.fit(Dying(plain()), DataLoader(make_dataset(), batch_size=8))
    except RuntimeError as error:
        (OUT / f"error{RANK}").write_text(f"{error}\n{strategy.ledger.num_steps} {trainer.global_step}")
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
