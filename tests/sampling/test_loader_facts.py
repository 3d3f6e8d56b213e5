"""The facts of a private loader: rates, counts and limits."""

from __future__ import annotations

import pytest
from torch.utils.data import (
    DataLoader,
)

from lightning_dp.sampling import (
    SamplingFacts,
    private_dataloader,
)
from tests.sampling.test_loader import SAMPLINGS, Records, Stream, members


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.size


def test_facts_of_poisson() -> None:
    loader = private_dataloader(DataLoader(range(1000), batch_size=10), accumulate=4, rank=1, world_size=2)
    assert loader.facts == SamplingFacts(
        "poisson", 1000, 80, 0.08, 12, accumulate=4
    )  # 1000 / 80 = 12.5, rounded to even
    assert len(loader) == 48
    assert loader.facts.add_remove_changes_one_batch


def test_facts_of_shuffle() -> None:
    facts = private_dataloader(DataLoader(range(105), batch_size=10), sampling="shuffle").facts
    assert facts == SamplingFacts("shuffle", 105, 10, None, 10)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_number_of_items_is_the_same_on_all_ranks(sampling: str, accumulate: int) -> None:
    loaders = [
        private_dataloader(
            DataLoader(Records(11), batch_size=1), sampling=sampling, accumulate=accumulate, rank=rank, world_size=3
        )
        for rank in range(3)
    ]
    for loader in loaders:
        assert loader.facts == loaders[0].facts
        assert {len(list(loader)) for _ in range(5)} == {len(loaders[0])}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_num_batches_kept_limits_the_records(sampling: str) -> None:
    loader = private_dataloader(
        DataLoader(Records(1000), batch_size=10), sampling=sampling, num_batches_kept=3, world_size=2, rank=1
    )
    assert (loader.facts.dataset_size, loader.facts.steps_per_epoch, loader.facts.expected_batch_size) == (60, 3, 20)
    assert loader.facts.sample_rate == (1 / 3 if sampling == "poisson" else None)
    seen = {value for _ in range(30) for batch in members(loader) for value in batch}
    assert seen == set(range(1, 60, 2))
    whole = private_dataloader(DataLoader(Records(30), batch_size=10), num_batches_kept=9)
    assert whole.facts.dataset_size == 30


@pytest.mark.parametrize(("stream", "size", "steps"), [(Stream(10), None, None), (SizedStream(10), 10, 2)])
def test_stream_keeps_its_order_and_batches(stream: Stream, size: int | None, steps: int | None) -> None:
    loader = private_dataloader(
        DataLoader(stream, batch_size=3), sampling="shuffle", microbatch_size=2, accumulate=2, world_size=1
    )
    items = [[(count, batch.tolist()) for count, batch in item.microbatches] for item in loader]
    assert items == [[(1, [0]), (2, [1, 2])], [(1, [3]), (2, [4, 5])], [(1, [6]), (2, [7, 8])], [(1, [9])]]
    expected = SamplingFacts(
        "shuffle", size, 6, None, steps, add_remove_changes_one_batch=False, accumulate=2, order=(3, 0, 1)
    )
    assert loader.facts == expected


def test_state_is_empty() -> None:
    loader = private_dataloader(DataLoader(range(10), batch_size=2))
    assert loader.state_dict() == {}
    loader.load_state_dict({"anything": 1})
    assert len(list(loader)) == 5
