"""Checks of the Trainer that trains a DataLens, and of its training loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_dp.datalens.settings import DataLensSettings
from lightning_dp.datalens.shards import StepsOver
from lightning_dp.sampling.checks import check_once
from lightning_dp.sampling.gather import is_plain
from lightning_dp.strategies._lightning import MultiProcessingLauncher, start_method
from lightning_dp.strategies.base import PrivateStrategy
from lightning_dp.strategies.trainer_checks import check_bounded, check_precision
from lightning_dp.trials.loading import check_collating, is_own
from lightning_dp.trials.partners import check_partners
from lightning_dp.trials.reading import check_reading
from lightning_dp.trials.repeats import check_repeats

_WHOLE = (RandomSampler, SequentialSampler, DistributedSampler, BatchSampler)


def check_trainer(trainer: pl.Trainer, settings: DataLensSettings) -> None:
    """Refuse a Trainer whose strategy, precision, number of ranks or length does not suit DataLens."""
    strategy = trainer.strategy
    if isinstance(strategy, PrivateStrategy):
        raise ValueError(
            f"Expected a plain `Trainer(strategy='auto')` with DataLens, got {type(strategy).__name__}. DataLens draws "
            "its own noise and keeps its own ledger: leave the private strategy out."
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"Expected `Trainer(strategy='auto')` or 'ddp' with DataLens, got {type(strategy).__name__}. The teachers "
            "are split over the ranks of DDP."
        )
    if isinstance(strategy.launcher, MultiProcessingLauncher):
        raise ValueError(
            f"Expected `Trainer(strategy='ddp')` with DataLens, got start_method={start_method(strategy.launcher)!r}. "
            "Processes that are spawned or forked keep the ledger to themselves, and epsilon would be lost when they "
            "end."
        )
    check_precision(str(trainer.precision))
    if settings.num_teachers < trainer.world_size:
        raise ValueError(
            f"Expected at least one teacher per rank, got num_teachers={settings.num_teachers} on {trainer.world_size} "
            "ranks."
        )
    if settings.target_epsilon is not None:
        check_bounded(trainer, "sigma")


def dataset_of(trainer: pl.Trainer) -> Any:
    """Return the map-style dataset behind the Trainer's one training loader.

    Raises:
        ValueError: several loaders, a stream, or a sampler that may leave out or weight records.
    """
    loader = trainer.train_dataloader
    if isinstance(loader, StepsOver):
        return loader.dataset
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"Expected one training DataLoader, or StepsOver(dataset, steps_per_epoch), got {type(loader).__name__}. "
            "The shards are cut from one map-style dataset."
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Expected a map-style dataset, got {type(dataset).__name__}. Shards are cut by index: read the stream "
            "into a list."
        )
    for sampler in (loader.sampler, loader.batch_sampler):
        if sampler is not None and not isinstance(sampler, _WHOLE):
            raise ValueError(
                f"Expected a loader over all records, got a {type(sampler).__name__}. The teachers read the dataset "
                "itself: pass torch.utils.data.Subset(dataset, indices) to leave records out."
            )
    return dataset


def check_records(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
    """Check that one record is in one shard: at one position of the dataset, and in no item of another position.

    Raises:
        ValueError: ``Subset`` or ``ConcatDataset`` repeats records.
        PrivacyError: the dataset itself does, or makes items of several records, or the collate function keeps some.
    """
    size = len(dataset)
    check_once(dataset, size)
    positions = sorted({0, size // 2, size - 1})
    if not is_plain(dataset):
        check_reading(dataset, positions)
        check_partners(dataset, positions)
        check_repeats(dataset)
    if collate is not None and is_own(collate) and size > 2:
        check_collating(collate, collate, [dataset[position] for position in positions])


def collate_of(trainer: pl.Trainer) -> Callable[[list[Any]], Any] | None:
    """Return the training loader's collate function, or None if it has none."""
    return getattr(trainer.train_dataloader, "collate_fn", None)
