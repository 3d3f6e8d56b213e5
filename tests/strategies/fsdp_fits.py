"""Fits of the processes that fsdp_run.py starts: their rank and folder, strategy, and what they keep of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_dp import (
    DPFSDPStrategy,
    PrivacyError,
)
from tests.helpers import make_trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])
#: Processes of a run: 2, but for the one that resumes alone.
DEVICES = 1 if "resumed_alone" in sys.argv else 2


class Released(L.Callback):
    """Keeps the released gradients, whole."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.grads.append(whole({n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None}))


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def private(**options: Any) -> DPFSDPStrategy:
    """Samples are checked in ``checked_*`` and ``skipped`` only: it takes longer than all else."""
    given = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "check_per_sample": False,
        **options,
    }
    return DPFSDPStrategy(**{name: value for name, value in given.items() if value is not None})


def fit(
    module: L.LightningModule,
    loader: Any,
    callbacks: Any = (),
    strategy: Any = None,
    resume: Any = None,
    **options: Any,
) -> L.Trainer:
    options = {"max_epochs": None, "devices": DEVICES, "callbacks": list(callbacks), **options}
    trainer = make_trainer(strategy or private(), OUT, **options)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def said(run: Callable[[], Any]) -> str:
    """What the error of a run says."""
    try:
        run()
    except (PrivacyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
