"""Run by the slow part of test_rank_attacks.py: what the default tests leave out under FSDP."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.strategies.rank_attacks_run import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(rest=True)
