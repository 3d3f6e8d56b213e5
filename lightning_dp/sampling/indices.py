"""The random draws: batch samplers that decide which record is in which step."""

from __future__ import annotations

import itertools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


def _generator(seed: int | None, rank: int, world_size: int) -> np.random.Generator:
    """Return rank's own stream: 256 bits of the system's entropy, or the rank's child of a seed.

    Neither torch's nor numpy's global seed has any influence.
    """
    if seed is None:
        root = np.random.SeedSequence(secrets.randbits(256))
    else:
        root = np.random.SeedSequence(seed).spawn(world_size)[rank]
    return np.random.Generator(np.random.PCG64DXSM(root))


class _PrivateBatchSampler(Sampler[list[int]], ABC):
    """What both samplers share: rank's own records ``rank, rank + W, ...`` and a stream that is never rewound.

    A copy (pickle, ``copy``) of a sampler without a seed draws from fresh entropy, so that two copies never pick the
    same records.
    """

    def __init__(
        self,
        *,
        dataset_size: int,
        expected_batch_size: int,
        steps_per_epoch: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int | None,
    ) -> None:
        self.dataset_size = dataset_size
        self.expected_batch_size = expected_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.num_own = len(range(rank, dataset_size, world_size))
        self._rng = _generator(seed, rank, world_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    @abstractmethod
    def __iter__(self) -> Iterator[list[int]]: ...

    def _records(self, own: np.ndarray[Any, Any]) -> list[int]:
        """Map positions among the rank's own records to indices of the dataset."""
        records: list[int] = (own * self.world_size + self.rank).tolist()
        return records

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.seed is None:
            del state["_rng"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_rng" not in state:
            self._rng = _generator(None, self.rank, self.world_size)


class PoissonBatchSampler(_PrivateBatchSampler):
    """Every record joins every logical batch independently with probability q = expected_batch_size / dataset_size.

        K ~ Binomial(own records, q);   the K members are a uniform subset without replacement

    which is the same distribution as one coin a record and costs O(K) draws. A logical batch is handed out in
    ``accumulate`` consecutive items; each member goes to one of them uniformly and independently.

    **Guarantee**: the union over ranks is one Poisson(q) sample of all records, independent between steps and passes.
    The number of items of a pass is a public constant, the same on every rank. Batch sizes and members are private.

    Args:
        dataset_size: number of records n >= 1 over all ranks.
        expected_batch_size: B with 1 <= B <= n, over all ranks and parts.
        steps_per_epoch: logical batches in a pass.
        accumulate: items a logical batch is handed out in, >= 1.
        rank: this process.
        world_size: number of processes.
        seed: for tests; whoever knows it knows the batches.
    """

    def __iter__(self) -> Iterator[list[int]]:
        sample_rate = self.expected_batch_size / self.dataset_size
        for _ in range(self.steps_per_epoch):
            count = self._rng.binomial(self.num_own, sample_rate)
            members = self._rng.choice(self.num_own, size=count, replace=False)
            if self.accumulate == 1:
                yield self._records(members)
                continue
            part = self._rng.integers(self.accumulate, size=count)
            for number in range(self.accumulate):
                yield self._records(members[part == number])


class ShuffleBatchSampler(_PrivateBatchSampler):
    """Every record joins exactly one item of a pass, chosen uniformly and independently of all other records.

    Balls into bins: sizes vary around the expected batch size. A random permutation cut into batches of fixed size
    looks similar but is not private in the same way: one record more or less there moves all that follow it to other
    places, so that many batches change by two records. Here exactly one batch of a pass changes, by exactly one record.

    **Guarantee**: one record contributes to one step of a pass. The step is uniform over the ``steps_per_epoch`` logical
    batches, independent of all other records and ranks, and drawn again in each pass. Batch sizes and members are private.

    Args:
        dataset_size: number of records n >= 1 over all ranks.
        expected_batch_size: B with 1 <= B <= n, over all ranks and parts.
        steps_per_epoch: logical batches in a pass.
        accumulate: items a logical batch is handed out in, >= 1.
        rank: this process.
        world_size: number of processes.
        seed: for tests; whoever knows it knows the batches.
    """

    def __iter__(self) -> Iterator[list[int]]:
        items = len(self)
        bins = self._rng.integers(items, size=self.num_own)
        order = np.argsort(bins, kind="stable")
        edges = np.searchsorted(bins[order], np.arange(items + 1))
        for start, stop in itertools.pairwise(edges):
            yield self._records(order[start:stop])
