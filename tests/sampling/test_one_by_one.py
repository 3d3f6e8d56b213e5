"""Items of a private loader cut into microbatches of one unit, after they were collated together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import private_dataloader


class Random(Dataset[Any]):
    """Records with noise of their own, drawn while they are read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_by_one_reads_the_same_records_again(num_workers: int) -> None:
    """What was collated together is read again under its own randomness; what is drawn later is cut at once."""
    loader = private_dataloader(DataLoader(Random(), batch_size=5, num_workers=num_workers), sampling="shuffle")
    items = iter(loader)
    whole = next(items)
    cut = loader.one_by_one(whole)
    assert [count for count, _ in cut.microbatches] == [1] * whole.num_samples
    assert torch.equal(torch.cat([batch for _, batch in cut.microbatches]), whole.microbatches[0][1])
    assert loader.one_by_one(cut) is cut
    for item in [*items, *loader]:
        again = loader.one_by_one(item)
        assert all(count == 1 for count, _ in again.microbatches)
    assert all(item.draw.alone for item in loader)


def test_one_by_one_keeps_the_records_of_a_user_together() -> None:
    users = [0, 0, 0, 1, 2, 2]
    loader = private_dataloader(DataLoader(range(6), batch_size=3), sampling="shuffle", unit=users, records_per_unit=2)
    for item in loader:
        cut = loader.one_by_one(item)
        for (count, batch), owners in zip(cut.microbatches, cut.owners, strict=True):
            assert count == 1
            assert len({users[record] for record in batch.tolist()}) == 1
            assert not owners.any()


def test_one_by_one_cannot_cut_a_stream() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(8))

    loader = private_dataloader(DataLoader(Stream(), batch_size=4), sampling="shuffle")
    with pytest.raises(PrivacyError, match=r"random access.*got a stream.*grad_sample='single'"):
        loader.one_by_one(next(iter(loader)))
