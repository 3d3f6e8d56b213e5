"""Run by test_privacy_audit.py in two processes: an audited run; each rank writes down what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lightning_dp import DPDDPStrategy, PrivacyAudit
from tests.auditing.models import ALMOST_SURE, DELTA, Idle
from tests.helpers import make_loader, make_trainer

OUT = Path(sys.argv[1])


def main() -> None:
    audit = PrivacyAudit(1000, confidence=ALMOST_SURE)
    strategy = DPDDPStrategy(noise_multiplier=2.0, target_delta=DELTA, check_per_sample=False)
    trainer = make_trainer(strategy, OUT, max_epochs=16, callbacks=[audit], devices=2)
    trainer.fit(Idle(1000), make_loader(batch_size=32))
    seen = {"result": audit.result, "included": audit.included.tolist()}
    torch.save(seen, OUT / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
