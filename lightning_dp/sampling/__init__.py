"""Which records meet in which step, and how they reach the training step.

Read in this order: ``indices`` (the random draws), ``batches`` (what one item of the loader is), ``checks`` (which
loaders cannot be made private, and why), ``loader`` (puts them together).
"""

from lightning_dp.sampling.batches import LogicalBatch
from lightning_dp.sampling.loader import (
    PrivateDataLoader,
    SamplingFacts,
    collate_samples,
    peek_samples,
    private_dataloader,
)

__all__ = [
    "LogicalBatch",
    "PrivateDataLoader",
    "SamplingFacts",
    "collate_samples",
    "peek_samples",
    "private_dataloader",
]
