"""A small table in two classes, a small DataLens for it, and a quiet Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset

from lightning_dp.datalens import DataLens, MLPDiscriminator, MLPGenerator, StepsOver
from tests.helpers import make_trainer

NUM_RECORDS, NUM_FEATURES, NUM_CLASSES = 60, 3, 2


def make_records(num_records: int = NUM_RECORDS) -> TensorDataset:
    """Rows in [-1, 1] whose first column follows the label."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(NUM_CLASSES, (num_records,), generator=generator)
    features = torch.rand(num_records, NUM_FEATURES, generator=generator) * 2 - 1
    features[:, 0] = 0.5 * (2 * labels - 1) + 0.1 * features[:, 0]
    return TensorDataset(features, labels)


def make_networks() -> tuple[MLPGenerator, MLPDiscriminator]:
    """The same initial weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return (
            MLPGenerator(4, NUM_FEATURES, num_classes=NUM_CLASSES, hidden=8),
            MLPDiscriminator(NUM_FEATURES, num_classes=NUM_CLASSES, hidden=8),
        )


def make_model(**options: Any) -> DataLens:
    """Six teachers of ten records each, two votes on each of four samples."""
    defaults: dict[str, Any] = {
        "num_teachers": 6,
        "top_k": 2,
        "sigma": 3.0,
        "threshold": 0.1,
        "target_delta": 1e-5,
        "z_dim": 4,
        "num_classes": NUM_CLASSES,
        "batch_size": 4,
        "d_steps": 1,
        "pretrain_steps": 2,
        "teacher_batch_size": 5,
    }
    options = {**defaults, **options}
    if "target_epsilon" in options:
        options["sigma"] = None
    return DataLens(*make_networks(), **options)


def fit(model: DataLens, tmp_path: Any, *, loader: Any = None, resume: Any = None, **options: Any) -> Any:
    """Fits four steps an epoch, one epoch by default; returns the Trainer."""
    trainer = make_trainer("auto", tmp_path, **options)
    loader = StepsOver(make_records(), 4) if loader is None else loader
    trainer.fit(model, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer
