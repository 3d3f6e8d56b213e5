"""Public facts about the sampling of a private loader, for accounting and planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_dp.sampling.checks import dataset_length


@dataclass(frozen=True)
class SamplingFacts:
    """Public facts about the sampling of records, or whole users, into logical batches.

    Args:
        sampling: "poisson", "shuffle" or "cyclic".
        dataset_size: number of units n sampled from: records, or users; ``None`` if unknown (an iterable dataset
            without length).
        expected_batch_size: units B expected in a logical batch, over all ranks and parts: the divisor of the sum.
        sample_rate: q = B / n for "poisson"; ``None`` for "shuffle" and "cyclic".
        steps_per_epoch: logical batches in a pass; ``None`` if unknown.
        add_remove_changes_one_batch: whether adding or removing a unit changes one batch of a pass by one unit. False
            for iterable datasets, whose batches are cut in order, so an added record moves all later ones. False for
            "cyclic" with a public assignment, which goes by position, so a removed record shifts all later ones. Then
            only relations that keep the other records in place change a single batch.
        accumulate: number of items of a logical batch.
        separation: exact number of logical steps between two uses of a unit; ``None`` if random or not promised.
        fixed_order: whether the order is the same in every pass.
        order: of a stream: batch size, workers and processes, which its order depends on, as does the dataset.
        unit: "record" or "user", the protected unit.
        records_per_unit: most records that a user brings to a logical batch; ``None`` for records.
    """

    sampling: str
    dataset_size: int | None
    expected_batch_size: int
    sample_rate: float | None
    steps_per_epoch: int | None
    add_remove_changes_one_batch: bool = True
    accumulate: int = 1
    separation: int | None = None
    fixed_order: bool = False
    order: tuple[int, ...] = ()
    unit: str = "record"
    records_per_unit: int | None = None

    @property
    def batches_per_pass(self) -> int | None:
        """Number of logical batches per pass if each unit joins exactly one, drawn uniformly; ``None`` otherwise."""
        drawn = self.sampling == "shuffle" and self.add_remove_changes_one_batch
        return self.steps_per_epoch if drawn else None

    def passes(self, steps: int) -> int:
        """Return the most times that a unit takes part in the first ``steps`` logical steps: k in sens(C).

        Args:
            steps: logical steps of the planned run, >= 1.

        Raises:
            ValueError: the order is not fixed, or the length of a pass is unknown.

        Example:
            >>> SamplingFacts("cyclic", 100, 10, None, 10, separation=10, fixed_order=True).passes(25)
            3
        """
        if self.separation is not None:
            return -(-steps // self.separation)
        if self.sampling == "shuffle" and not self.add_remove_changes_one_batch:
            if self.steps_per_epoch is not None and steps <= self.steps_per_epoch:
                return 1
            raise ValueError(
                f"Expected fixed_order=True and a stream with a length for {steps} steps, got "
                f"fixed_order={self.fixed_order} and {self.steps_per_epoch} steps in a pass. Promise that every pass "
                "has the same order, or train for one pass."
            )
        raise ValueError(
            f'Expected data in a fixed order, got sampling="{self.sampling}" over data with random access. '
            'Use sampling="cyclic".'
        )


def map_facts(
    loader: DataLoader[Any],
    size: int,
    *,
    sampling: str,
    accumulate: int,
    world_size: int,
    num_batches_kept: int | None,
    records_per_unit: int | None,
    public_assignment: bool,
) -> SamplingFacts:
    """Return the sampling facts for a dataset with random access and ``size`` units.

    Raises:
        ValueError: the expected logical batch is larger than the number of units.
    """
    assert isinstance(loader.batch_sampler, BatchSampler)
    batch_size = loader.batch_sampler.batch_size
    expected = batch_size * world_size * accumulate
    unit = "record" if records_per_unit is None else "user"
    if expected > size:
        raise ValueError(
            f"Expected an expected batch size of at most the dataset size, got {expected} (batch_size={batch_size} x "
            f"world_size={world_size} x accumulate={accumulate}) for {size} {unit}s: the sampling probability would "
            "exceed 1. Reduce the batch size."
        )
    if num_batches_kept is not None:
        size = min(size, num_batches_kept * expected)
    steps_per_epoch = max(1, round(size / expected))
    return SamplingFacts(
        sampling=sampling,
        dataset_size=size,
        expected_batch_size=expected,
        sample_rate=expected / size if sampling == "poisson" else None,
        steps_per_epoch=steps_per_epoch,
        add_remove_changes_one_batch=not public_assignment,
        accumulate=accumulate,
        separation=steps_per_epoch if sampling == "cyclic" else None,
        fixed_order=sampling == "cyclic",
        unit=unit,
        records_per_unit=records_per_unit,
    )


def stream_facts(loader: DataLoader[Any], *, accumulate: int, world_size: int, fixed_order: bool) -> SamplingFacts:
    """Return the sampling facts for an iterable dataset; ``fixed_order`` promises the same order in every pass."""
    assert loader.batch_size is not None
    size: int | None = dataset_length(loader.dataset) if hasattr(loader.dataset, "__len__") else None
    steps_per_epoch = None if size is None else -(-len(loader) // accumulate)
    return SamplingFacts(
        sampling="shuffle",
        dataset_size=size,
        expected_batch_size=loader.batch_size * world_size * accumulate,
        sample_rate=None,
        steps_per_epoch=steps_per_epoch,
        add_remove_changes_one_batch=False,
        accumulate=accumulate,
        separation=steps_per_epoch if fixed_order else None,
        fixed_order=fixed_order,
        order=(loader.batch_size, loader.num_workers, world_size),
    )
