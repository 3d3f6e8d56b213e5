"""Run by test_nodes.py under torchrun, one process per node: trains replicated and sharded, and writes down what it
saw.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils.data import DataLoader

from lightning_dp import DPDDPStrategy, DPFSDPStrategy
from tests.helpers import make_dataset, make_trainer
from tests.strategies.sharded import Sharded, plain

OUT = Path(sys.argv[1])


class Logging(Sharded):
    """Logs with a collective, while the ranks hold different numbers of microbatches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("nonprivate/size", float(len(batch[1])), sync_dist=True, on_step=True)
        return super().training_step(batch, batch_idx)


def fit(strategy: Any) -> dict[str, Any]:
    module = Logging(plain(), optimizer=torch.optim.Adam, lr=0.05)
    trainer = make_trainer(strategy, OUT, num_nodes=2, max_epochs=1)
    trainer.fit(module, DataLoader(make_dataset(), batch_size=8))
    weights: list[Any] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return {
        "weights": torch.cat([weight.detach().flatten() for weight in weights]),
        "ranks": (trainer.node_rank, trainer.local_rank, trainer.global_rank, trainer.world_size),
        "events": [(e.event.sample_rate, e.num_steps) for e in strategy.ledger.entries],
        "size": float(trainer.callback_metrics["nonprivate/size"]),
    }


def main() -> None:
    options: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "microbatch_size": 3,
        "check_per_sample": False,  # as test_ddp.py and test_fsdp.py check
    }
    seen = {kind.__name__: fit(kind(**options)) for kind in (DPDDPStrategy, DPFSDPStrategy)}
    torch.save(seen, OUT / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
