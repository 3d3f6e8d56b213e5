"""Random draws of the records of each step, and the loading of these records.

Read in this order: ``indices`` (random draws), ``units`` (users with several records), ``batches`` (items of the
loader), ``fetch`` and ``randomness`` (reading of an item), ``facts`` (public facts), ``checks`` (refusal of loaders
that cannot be private), ``shapes`` (training data in other forms than one loader), ``loader`` (the private loader),
``make`` (its construction).
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
