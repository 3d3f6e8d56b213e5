"""The private loader: a torch ``DataLoader`` whose items are ``LogicalBatch`` objects, drawn privately."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset

from lightning_dp.sampling.batches import MicrobatchCollate, NonEmptyGetitems, reads_many
from lightning_dp.sampling.checks import check_count, check_loader, dataset_length
from lightning_dp.sampling.gather import Gather
from lightning_dp.sampling.indices import PoissonBatchSampler, ShuffleBatchSampler

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",  # seeds the workers; the private draws do not use it
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
)


@dataclass(frozen=True)
class SamplingFacts:
    """What is public about the sampling, and what accounting needs of it.

    Args:
        sampling: "poisson" or "shuffle".
        dataset_size: number of records n sampled from; ``None`` if unknown (an iterable dataset without length).
        expected_batch_size: records B expected in a logical batch, over all ranks and parts: the divisor of the sum.
        sample_rate: q = B / n for "poisson"; ``None`` for "shuffle".
        steps_per_epoch: logical batches in a pass; ``None`` if unknown.
        add_remove_changes_one_batch: whether one record more or less changes one batch of a pass by one record. False
            for iterable datasets, whose batches are cut in order: a record added moves all that follow. Then only the
            relation that replaces one record by another changes a single batch.
        accumulate: items that one logical batch is handed out in.
    """

    sampling: str
    dataset_size: int | None
    expected_batch_size: int
    sample_rate: float | None
    steps_per_epoch: int | None
    add_remove_changes_one_batch: bool = True
    accumulate: int = 1

    @property
    def batches_per_pass(self) -> int | None:
        """Logical batches of which each record joins exactly one in a pass, by a fair draw; ``None`` if not drawn so."""
        drawn = self.sampling == "shuffle" and self.add_remove_changes_one_batch
        return self.steps_per_epoch if drawn else None


class PrivateDataLoader(DataLoader[Any]):
    """A ``DataLoader`` over a private batch sampler; make one with ``private_dataloader``.

    ``loader.dataset`` is the user's own object. ``state_dict`` is empty by intent: after a resume the draws come from
    fresh randomness and nothing that depends on data is kept in a checkpoint; that the method exists tells Lightning
    that the loader can be resumed.

    Args:
        dataset: the user's dataset.
        facts: what is public about the sampling.
        kwargs: arguments of ``torch.utils.data.DataLoader``.
    """

    def __init__(self, dataset: Any, *, facts: SamplingFacts, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.facts = facts

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        dataset, collate = self.dataset, self.collate_fn
        if isinstance(dataset, IterableDataset) or not isinstance(collate, MicrobatchCollate):
            return super().__iter__()
        rows = Gather.of(dataset, collate.collate_fn) if self.num_workers == 0 else None
        # The iterator (and its workers) take these two with them; whoever looks at the loader sees the user's own.
        if rows is not None:
            self.__dict__["dataset"] = rows
            self.__dict__["collate_fn"] = MicrobatchCollate(rows.collate, collate.microbatch_size)
        elif reads_many(dataset):
            self.__dict__["dataset"] = NonEmptyGetitems(dataset)
        try:
            return super().__iter__()
        finally:
            self.__dict__["dataset"], self.__dict__["collate_fn"] = dataset, collate

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: draws are fresh after a resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept any state and ignore it: draws are fresh after a resume."""


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
) -> PrivateDataLoader:
    """Return a loader over the same dataset whose batches are drawn as the privacy accounting assumes.

        expected_batch_size B = loader.batch_size * world_size * accumulate
        q = B / n;   steps_per_epoch = max(1, round(n / B));   len(loader) = steps_per_epoch * accumulate

    **Guarantee**: "poisson": each of the n records joins each logical batch independently with probability exactly q,
    over all ranks together. "shuffle" with a map-style dataset: each record joins exactly one logical batch of a pass,
    drawn uniformly and independently of the others. "shuffle" with an iterable dataset: order and batches are the
    dataset's own; that it yields each record once a pass, over all workers and ranks, is its promise and cannot be
    checked here, and adding a record shifts those behind it (see ``SamplingFacts.add_remove_changes_one_batch``).
    Sizes and members of batches are private; the number of items is public and the same on all ranks. The user's
    sampler order and ``drop_last`` have no meaning here and are not used (an iterable dataset keeps both).

    Args:
        loader: the user's loader; its dataset, collate function, workers and pinning are kept.
        sampling: "poisson" or "shuffle".
        microbatch_size: most samples on the device at once, >= 1; ``None`` for no limit.
        accumulate: items one logical batch is handed out in, >= 1.
        rank: this process, 0 <= rank < world_size; it samples the records rank, rank + world_size, ...
        world_size: number of processes, >= 1.
        seed: for tests only: whoever knows it knows the batches. ``None``: the operating system's entropy.
        num_batches_kept: use only the first ``num_batches_kept * B`` records (for overfitting checks); ``None``: all.
        extra_records: public records that follow those of the dataset, sampled and collated as they are: n counts them.

    Returns:
        The loader, with its public ``facts``.

    Raises:
        TypeError: not a plain ``DataLoader``, or a dataset that cannot be sampled this way.
        ValueError: a sampler with a meaning of its own, no batch size, or fewer records than a batch expects; extra records
            for a dataset without random access, or together with ``num_batches_kept``.

    Example:
        >>> private = private_dataloader(DataLoader(range(100), batch_size=20), accumulate=2)
        >>> len(private), private.facts.sample_rate, private.facts.steps_per_epoch
        (4, 0.4, 2)

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, section 3.1 (lots).
    """
    check_loader(loader, sampling)
    check_count("accumulate", accumulate, 1)
    check_count("world_size", world_size, 1)
    check_count("rank", rank, 0)
    if not rank < world_size:
        raise ValueError(f"Expected rank < world_size, got rank={rank}, world_size={world_size}.")
    for name, value in (("microbatch_size", microbatch_size), ("num_batches_kept", num_batches_kept)):
        if value is not None:
            check_count(name, value, 1)

    kept = {name: getattr(loader, name) for name in _KEPT if name in inspect.signature(DataLoader).parameters}
    kept["collate_fn"] = MicrobatchCollate(_user_collate(loader), microbatch_size)
    dataset = loader.dataset
    if extra_records:
        if isinstance(dataset, IterableDataset) or num_batches_kept is not None:
            raise ValueError(
                "Expected a whole dataset with random access for extra_records, got a stream or a part of one. Canaries need their "
                "place among the records: audit with gradient canaries, and without overfit_batches."
            )
        dataset = ConcatDataset([dataset, _Records(extra_records)])
    if isinstance(dataset, IterableDataset):
        if num_batches_kept is not None:
            raise ValueError(
                f"Expected num_batches_kept=None for an iterable dataset, got num_batches_kept={num_batches_kept}. "
                "Limit the dataset itself."
            )
        facts = _iterable_facts(loader, accumulate, world_size)
        return PrivateDataLoader(
            loader.dataset, facts=facts, batch_size=loader.batch_size, drop_last=loader.drop_last, **kept
        )
    facts = _map_facts(loader, dataset, sampling, accumulate, world_size, num_batches_kept)
    assert facts.dataset_size is not None
    assert facts.steps_per_epoch is not None
    sampler_class = PoissonBatchSampler if sampling == "poisson" else ShuffleBatchSampler
    sampler = sampler_class(
        dataset_size=facts.dataset_size,
        expected_batch_size=facts.expected_batch_size,
        steps_per_epoch=facts.steps_per_epoch,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )
    return PrivateDataLoader(dataset, facts=facts, batch_sampler=sampler, **kept)


def peek_samples(loader: DataLoader[Any], num: int) -> list[Any]:
    """Return the first ``num`` samples before collating, read in this process; fewer if the dataset has fewer.

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
    indices = list(range(min(num, dataset_length(dataset))))
    if reads_many(dataset):
        return NonEmptyGetitems(dataset).__getitems__(indices)
    return [dataset[index] for index in indices]


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
    return _user_collate(loader)(samples)


def _user_collate(loader: DataLoader[Any]) -> Any:
    collate_fn = loader.collate_fn
    return collate_fn.collate_fn if isinstance(collate_fn, MicrobatchCollate) else collate_fn


class _Records(Dataset[Any]):
    """A sequence of records as a dataset."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]


def _map_facts(
    loader: DataLoader[Any], dataset: Any, sampling: str, accumulate: int, world_size: int, num_batches_kept: int | None
) -> SamplingFacts:
    assert isinstance(loader.batch_sampler, BatchSampler)
    batch_size = loader.batch_sampler.batch_size
    expected = batch_size * world_size * accumulate
    size = dataset_length(dataset)
    if expected > size:
        raise ValueError(
            f"Expected an expected batch size of at most the dataset size, got {expected} (batch_size={batch_size} x "
            f"world_size={world_size} x accumulate={accumulate}) for {size} records: the sampling probability would "
            "exceed 1. Reduce the batch size."
        )
    if num_batches_kept is not None:
        size = min(size, num_batches_kept * expected)
    return SamplingFacts(
        sampling=sampling,
        dataset_size=size,
        expected_batch_size=expected,
        sample_rate=expected / size if sampling == "poisson" else None,
        steps_per_epoch=max(1, round(size / expected)),
        accumulate=accumulate,
    )


def _iterable_facts(loader: DataLoader[Any], accumulate: int, world_size: int) -> SamplingFacts:
    assert loader.batch_size is not None
    size: int | None = dataset_length(loader.dataset) if hasattr(loader.dataset, "__len__") else None
    items = None if size is None else len(loader)
    return SamplingFacts(
        sampling="shuffle",
        dataset_size=size,
        expected_batch_size=loader.batch_size * world_size * accumulate,
        sample_rate=None,
        steps_per_epoch=None if items is None else -(-items // accumulate),
        add_remove_changes_one_batch=False,
        accumulate=accumulate,
    )
