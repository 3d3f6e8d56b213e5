"""The private loader made from the user's ``DataLoader``, and a look at its raw samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from lightning_dp.sampling.batches import MicrobatchCollate, Stacked, Watch
from lightning_dp.sampling.checks import check_count, check_loader, check_once, check_options, dataset_length
from lightning_dp.sampling.facts import map_facts, stream_facts
from lightning_dp.sampling.fetch import is_whole, read
from lightning_dp.sampling.indices import CyclicBatchSampler, PoissonBatchSampler, ShuffleBatchSampler
from lightning_dp.sampling.loader import PrivateDataLoader, kept_options
from lightning_dp.sampling.units import Unit, Units, unit_ids

_SAMPLERS: dict[str, Any] = {
    "poisson": PoissonBatchSampler,
    "shuffle": ShuffleBatchSampler,
    "cyclic": CyclicBatchSampler,
}


def private_dataloader(
    loader: DataLoader[Any],
    *,
    sampling: str = "poisson",
    microbatch_size: int | None = None,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
    num_batches_kept: int | None = None,
    extra_records: Sequence[Any] = (),
    unit: Unit | None = None,
    records_per_unit: int | None = None,
    fixed_order: bool = False,
    public_assignment: int | None = None,
    watch: Watch | None = None,
) -> PrivateDataLoader:
    """Return a loader over the same dataset whose batches are drawn as the privacy accounting assumes.

        expected_batch_size B = loader.batch_size * world_size * accumulate
        q = B / n;   steps_per_epoch = max(1, round(n / B));   len(loader) = steps_per_epoch * accumulate

    A unit is a record, or with ``unit`` a user who brings at most ``records_per_unit`` of its records, chosen uniformly
    without replacement; n and B count units.

    **Guarantee**: "poisson": each of the n units joins each logical batch independently with probability exactly q,
    over all ranks together. "shuffle" with a map-style dataset: each unit joins exactly one logical batch of a pass,
    drawn uniformly and independently of the others. "cyclic": the same logical batch in every pass. "shuffle" with an
    iterable dataset: order and batches are the dataset's own. It must yield each record once per pass, over all workers
    and ranks, and with ``fixed_order`` in the same order; this cannot be checked here. Adding a record shifts the later
    ones (see ``SamplingFacts.add_remove_changes_one_batch``). Sizes and members of batches are
    private; the number of items is public and the same on all ranks. The user's sampler order and ``drop_last`` have no
    meaning here and are not used (an iterable dataset keeps both).

    Args:
        loader: the user's loader; its dataset, collate function, workers and pinning are kept.
        sampling: "poisson", "shuffle" or "cyclic".
        microbatch_size: most samples on the device at once, >= 1; ``None`` for no limit. A user is never split: one
            with more records goes alone.
        accumulate: number of loader items per logical batch, >= 1.
        rank: this process, 0 <= rank < world_size; it samples the units rank, rank + world_size, ...
        world_size: number of processes, >= 1.
        seed: for tests only: it reveals the batches to anyone who knows it. ``None``: the operating system's entropy.
        num_batches_kept: use only the first ``num_batches_kept * B`` units (for overfitting checks); ``None``: all.
        extra_records: public records that follow those of the dataset, sampled and collated like them; n counts
            each as a separate user.
        unit: users to protect in place of records: one user id per record (array, tensor, list), or the key (of
            mappings) or position (of tuples) at which items hold it; see ``unit_ids``. ``None``: single records.
        records_per_unit: G >= 1, most records that a user brings to a logical batch; with ``unit`` only.
        fixed_order: promise that a stream has the same order in every pass.
        public_assignment: for "cyclic": a number, the same on all ranks, that determines the groups and may be
            published, so that a run can resume; see ``CyclicBatchSampler`` for its price. ``None``: secret.
        watch: watches how items are read and collated, in the loading process.

    Returns:
        The loader, with its public ``facts``.

    Raises:
        TypeError: not a plain ``DataLoader``, or a dataset that cannot be sampled this way.
        ValueError: a sampler with a meaning of its own, no batch size, or fewer units than a batch expects; extra
            records for a dataset without random access, or together with ``num_batches_kept``; options that do not go
            together.

    Example:
        >>> private = private_dataloader(DataLoader(range(100), batch_size=20), accumulate=2)
        >>> len(private), private.facts.sample_rate, private.facts.steps_per_epoch
        (4, 0.4, 2)
        >>> users = private_dataloader(DataLoader(range(6), batch_size=1), unit=[7, 7, 7, 8, 8, 9], records_per_unit=2)
        >>> users.facts.dataset_size, users.facts.unit
        (3, 'user')

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, section 3.1 (lots).
        Charles et al. 2024, arXiv 2407.07737 (sampling of users).
    """
    check_loader(loader, sampling)
    check_count("accumulate", accumulate, 1)
    check_count("world_size", world_size, 1)
    check_count("rank", rank, 0)
    if not rank < world_size:
        raise ValueError(f"Expected rank < world_size, got rank={rank}, world_size={world_size}. Ranks count from 0.")
    for name, value in (
        ("microbatch_size", microbatch_size),
        ("num_batches_kept", num_batches_kept),
        ("records_per_unit", records_per_unit),
    ):
        if value is not None:
            check_count(name, value, 1)
    dataset, is_stream = loader.dataset, isinstance(loader.dataset, IterableDataset)
    check_options(
        sampling,
        is_stream=is_stream,
        num_batches_kept=num_batches_kept,
        has_extra_records=bool(extra_records),
        has_unit=unit is not None,
        records_per_unit=records_per_unit,
        fixed_order=fixed_order,
        public_assignment=public_assignment,
    )
    kept = kept_options(loader)
    collate = user_collate(loader)
    kept["collate_fn"] = MicrobatchCollate(Stacked(collate) if is_whole(dataset) else collate, microbatch_size, watch)
    if is_stream:
        return PrivateDataLoader(
            dataset,
            facts=stream_facts(loader, accumulate=accumulate, world_size=world_size, fixed_order=fixed_order),
            seed=None if seed is None else (seed, rank),
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            **kept,
        )
    size, units = dataset_length(dataset), None
    if records_per_unit is not None:
        assert unit is not None
        ids = unit_ids(dataset, size, unit, warn=rank == 0)
        units = Units([*ids, *(object() for _ in extra_records)], records_per_unit)
    else:
        check_once(dataset, size)
    if extra_records:
        dataset = ConcatDataset([dataset, _Records(extra_records)])
    facts = map_facts(
        loader,
        size + len(extra_records) if units is None else len(units),
        sampling=sampling,
        accumulate=accumulate,
        world_size=world_size,
        num_batches_kept=num_batches_kept,
        records_per_unit=records_per_unit,
        public_assignment=public_assignment is not None,
    )
    options: dict[str, Any] = {"public_assignment": public_assignment} if sampling == "cyclic" else {}
    sampler = _SAMPLERS[sampling](
        dataset_size=facts.dataset_size,
        expected_batch_size=facts.expected_batch_size,
        steps_per_epoch=facts.steps_per_epoch,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
        units=units,
        **options,
    )
    return PrivateDataLoader(dataset, facts=facts, batch_size=loader.batch_size, batch_sampler=sampler, **kept)


def peek_samples(loader: DataLoader[Any], num: int) -> list[Any]:
    """Return the first ``num`` samples before collating, read in this process; fewer from a smaller dataset.

    **Guarantee**: none: the samples are raw private records. Nothing computed from them may be released.

    Args:
        loader: a user's or a private loader.
        num: number of samples, >= 0.

    Returns:
        A list of samples, private.

    Raises:
        ValueError: a negative number.
    """
    check_count("num", num, 0)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        return list(itertools.islice(iter(dataset), num))
    return read(dataset, list(range(min(num, dataset_length(dataset)))))


def collate_samples(loader: DataLoader[Any], samples: list[Any]) -> Any:
    """Return the batch that the user's collate function makes of raw samples.

    Args:
        loader: a user's or a private loader.
        samples: a non-empty list, e.g. from ``peek_samples``.

    Returns:
        The batch as the user's training step expects it, private.

    Raises:
        ValueError: no samples; the user's function is never called with none.
    """
    if not samples:
        raise ValueError("Expected at least one sample, got samples=[]. An empty batch is never collated.")
    return user_collate(loader)(samples)


def user_collate(loader: DataLoader[Any]) -> Any:
    """Return the user's own collate function of a loader."""
    collate_fn = loader.collate_fn
    return collate_fn.collate_fn if isinstance(collate_fn, MicrobatchCollate) else collate_fn


class _Records(Dataset[Any]):
    """A dataset over a sequence of records."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]
