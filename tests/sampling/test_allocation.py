"""The shuffled sampler does what random allocation assumes: one fair and independent draw per record and pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp.sampling import private_dataloader

RECORDS, PASSES = 24, 4_000


def allocations(world_size: int, accumulate: int) -> tuple[np.ndarray[Any, Any], int]:
    """Logical batch of each record in each pass, over all ranks, shape (passes, records); and t as it is accounted."""
    found = np.full((PASSES, RECORDS), -1)
    for rank in range(world_size):
        loader = private_dataloader(
            DataLoader(range(RECORDS), batch_size=6 // (world_size * accumulate)),
            sampling="shuffle",
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
        )
        for number in range(PASSES):
            items = [np.asarray(item, dtype=int) for item in loader.batch_sampler]  # type: ignore[union-attr]
            records = np.concatenate(items)
            assert len(records) == RECORDS // world_size  # and together all: none twice
            found[number, records] = np.repeat(np.arange(len(items)) // accumulate, [*map(len, items)])
    assert (found >= 0).all()
    assert loader.facts.batches_per_pass is not None
    return found, loader.facts.batches_per_pass


def happens_with(events: np.ndarray[Any, Any], probability: float) -> bool:
    """5.3 standard errors: false-alarm rate 1e-7."""
    error = math.sqrt(probability * (1 - probability) / events.size)
    return bool(abs(events.mean() - probability) < 5.3 * error)


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.one_in(2)
def test_each_record_joins_one_logical_batch_by_a_fair_draw(world_size: int, accumulate: int) -> None:
    found, num_batches = allocations(world_size, accumulate)
    assert num_batches == 4
    for batch in range(num_batches):
        assert happens_with(found == batch, 1 / num_batches)
        assert all(happens_with(found[:, record] == batch, 1 / num_batches) for record in range(RECORDS))
    others = np.roll(found, 1, axis=1)[:, ::2]  # pairs of neighbours: of two ranks where there are two
    together, again = found[:, ::2] == others, found[1::2] == found[::2]
    for events in (together, again):
        assert happens_with(events, 1 / num_batches)
        for wrong in (2 / 3, 3 / 2, num_batches / (num_batches + 1)):
            assert not happens_with(events, wrong / num_batches)


def test_only_fair_draws_are_facts_of_an_allocation() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(RECORDS))

        def __len__(self) -> int:
            return RECORDS

    assert private_dataloader(DataLoader(range(RECORDS), batch_size=6)).facts.batches_per_pass is None
    stream = private_dataloader(DataLoader(Stream(), batch_size=6), sampling="shuffle")
    assert stream.facts.steps_per_epoch == 4
    assert stream.facts.batches_per_pass is None
