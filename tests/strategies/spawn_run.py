"""Run by test_ddp.py: trains in spawned or forked processes and prints what the main process knows afterwards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.trainer.connectors import accelerator_connector
from torch.utils.data import DataLoader

from lightning_dp import DPDDPStrategy, DPStrategy
from tests.helpers import Classifier, make_dataset, make_trainer


def main() -> None:
    out, start_method = Path(sys.argv[1]), sys.argv[2]
    accelerator_connector._IS_INTERACTIVE = start_method == "fork"  # as in a notebook, where nothing else is allowed
    options: Any = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    module, strategy = Classifier(), DPDDPStrategy(start_method=start_method, **options)
    trainer = make_trainer(strategy, out, devices=2)
    trainer.fit(module, DataLoader(make_dataset(), batch_size=8))
    trainer.save_checkpoint(out / "after.ckpt")
    assert strategy.epsilon() > 0
    options["check_per_sample"] = False  # the first run has shown that checks work in started processes
    again = DPDDPStrategy(start_method="fork", **options)
    accelerator_connector._IS_INTERACTIVE = True
    make_trainer(again, out, devices=2).fit(module, DataLoader(make_dataset(), batch_size=8))
    alone = DPStrategy(**options)
    accelerator_connector._IS_INTERACTIVE = False
    make_trainer(alone, out).fit(module, DataLoader(make_dataset(), batch_size=16))
    steps = [each.ledger.num_steps for each in (strategy, again, alone)]
    print(*steps, strategy.steps_taken, strategy.plan.steps)


if __name__ == "__main__":
    main()
