"""Random draws of the records of each step, and their transport to the training step.

Read in this order: ``indices`` (the random draws), ``units`` (users with several records), ``batches`` (one item of the
loader), ``fetch`` and ``randomness`` (how it is read), ``facts`` (what is public), ``checks`` (which loaders cannot be
made private, and why), ``shapes`` (training data that is not one loader), ``loader``, ``make`` (put them together).
"""

from lightning_dp.sampling.batches import LogicalBatch
from lightning_dp.sampling.facts import SamplingFacts
from lightning_dp.sampling.loader import PrivateDataLoader
from lightning_dp.sampling.make import collate_samples, peek_samples, private_dataloader
from lightning_dp.sampling.randomness import fresh_randomness
from lightning_dp.sampling.shapes import one_loader
from lightning_dp.sampling.units import Unit

__all__ = [
    "LogicalBatch",
    "PrivateDataLoader",
    "SamplingFacts",
    "Unit",
    "collate_samples",
    "fresh_randomness",
    "one_loader",
    "peek_samples",
    "private_dataloader",
]
