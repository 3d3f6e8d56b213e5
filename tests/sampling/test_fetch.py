"""The wrapper between torch's loader and the user's dataset: it passes as the dataset, also in workers."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_dp.sampling import private_dataloader
from lightning_dp.sampling.batches import MicrobatchCollate
from lightning_dp.sampling.fetch import BeforeRecords, BeforeStream
from lightning_dp.sampling.indices import Draw
from tests.sampling.test_randomness import Augmented, AugmentedMany, AugmentedStream, states


def prepare(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, (Augmented, AugmentedStream))
    info.dataset.own = torch.Generator().manual_seed(worker)  # type: ignore[union-attr]


class WithOwnGenerator(Augmented):
    own: Any = None

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1, generator=self.own).item()


class StreamWithOwnGenerator(AugmentedStream):
    own: Any = None

    def __iter__(self) -> Iterator[Any]:
        return (torch.rand(1, generator=self.own).item() for _ in range(6))


@pytest.mark.parametrize("dataset", [WithOwnGenerator(), StreamWithOwnGenerator()], ids=["records", "stream"])
def test_worker_init_fn_keeps_its_say(dataset: Any) -> None:
    """It sees the user's dataset, and a generator that it makes goes on undisturbed."""
    loader = DataLoader(dataset, batch_size=3, collate_fn=list, num_workers=1, worker_init_fn=prepare)
    sampling = "shuffle" if isinstance(dataset, IterableDataset) else "poisson"
    private = private_dataloader(loader, sampling=sampling)
    drawn = [value for item in private for _, part in item.microbatches for value in part]
    generator = torch.Generator().manual_seed(0)
    assert drawn == [torch.rand(1, generator=generator).item() for _ in drawn]
    assert len(drawn) > 3
    assert private.dataset is dataset


def test_what_stands_before_a_dataset_passes_as_it() -> None:
    dataset = AugmentedMany(7, burnt=2)
    before: Any = BeforeRecords(dataset, MicrobatchCollate(list, None))
    assert isinstance(before, AugmentedMany)
    assert (len(before), before.burnt, before[3][0]) == (7, 2, 3)
    before.burnt = 5
    assert dataset.burnt == 5
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = before.no_such_name


@pytest.mark.parametrize(
    "before",
    [
        BeforeRecords(Augmented(4), MicrobatchCollate(list, 2)),
        BeforeStream(AugmentedStream(4), MicrobatchCollate(list, 2), batch_size=2, seed=(3, 0, 1)),
    ],
    ids=["records", "stream"],
)
def test_dataset_wrapper_can_be_sent_to_spawned_workers(before: Any) -> None:
    """As the pair of dataset and collate function that a worker gets: they must still share their randomness."""
    if isinstance(before, IterableDataset):
        stream, collate = pickle.loads(pickle.dumps((before, before.collate)))
        state = states()
        records = list(itertools.islice(iter(stream), 2))
        assert states() != state
        assert collate(records).num_samples == 2
        assert states() == state
    else:
        again = pickle.loads(pickle.dumps(before))
        draw = pickle.loads(pickle.dumps(Draw([3, 1, 0], entropy=9)))
        assert (draw, draw.entropy, draw.sizes) == ([3, 1, 0], 9, None)
        assert again.__getitems__(draw).microbatches == before.__getitems__(draw).microbatches
