"""The random draws: batch samplers that assign records, or users, to steps."""

from __future__ import annotations

import itertools
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.units import Units

_CHOICES, _ENTROPY = 1, 2  # children of a rank's seed, in addition to the stream of its draws


def _generator(seed: int | None, rank: int, world_size: int) -> np.random.Generator:
    """Return the generator of a rank, seeded with 256 bits of the system's entropy or the rank's child of a seed.

    Neither torch's nor numpy's global seed has any influence.
    """
    if seed is None:
        root = np.random.SeedSequence(secrets.randbits(256))
    else:
        root = np.random.SeedSequence(seed).spawn(world_size)[rank]
    return np.random.Generator(np.random.PCG64DXSM(root))


class Draw(list[int]):
    """Indices of the records of one loader item, with the entropy for reading them.

    Args:
        indices: into the dataset; private.
        sizes: number of these indices per user, in order; ``None`` if the unit is a record.
        entropy: seed of the random streams of the code that reads the records.
        alone: whether each unit is a microbatch of its own, whatever the loader was made for.
    """

    __slots__ = ("alone", "entropy", "sizes")

    def __init__(
        self, indices: Iterable[int], *, entropy: int, sizes: list[int] | None = None, alone: bool = False
    ) -> None:
        super().__init__(indices)
        self.sizes = sizes
        self.entropy = entropy
        self.alone = alone


class _PrivateBatchSampler(Sampler[list[int]], ABC):
    """Base class of the samplers: each draws from its rank's units ``rank, rank + W, ...``.

    A unit is a record, or a user with some records. The random generators are never reset. A copy or pickle of a
    sampler without a seed has fresh entropy, so two copies draw independently.

    Args:
        dataset_size: number of units n >= 1 over all ranks.
        expected_batch_size: B with 1 <= B <= n, over all ranks and parts.
        steps_per_epoch: logical batches in a pass.
        accumulate: number of items of a logical batch, >= 1.
        rank: rank of this process.
        world_size: number of processes.
        seed: for tests; whoever knows it knows the batches.
        units: the records of every user; ``None`` if the unit is a record.
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
        units: Units | None = None,
    ) -> None:
        self.dataset_size = dataset_size
        self.expected_batch_size = expected_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.units = units
        self.alone = False
        """Whether each unit of what is drawn from here on is a microbatch of its own."""
        self.num_own = len(range(rank, dataset_size, world_size))
        self._num_draws = 0
        self._start()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; those that determine the sampling rate are set once.

        Raises:
            PrivacyError: the rate would change, and the ledger would not know.
        """
        if name in self.__dict__ and name not in ("alone", "position") and not name.startswith("_"):
            raise PrivacyError(
                f"Expected {name} of the private sampler to stay as the ledger counts it, got {name}={value!r} for "
                f"{self.__dict__[name]!r}. Set the batch size of your own loader, and steps per batch by "
                "GradientAccumulationScheduler."
            )
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    @abstractmethod
    def __iter__(self) -> Iterator[list[int]]: ...

    def _start(self) -> None:
        self._rng = _generator(self.seed, self.rank, self.world_size)
        # a stream of its own, so that who joins does not depend on how many records each user has
        self._choices = np.random.Generator(np.random.PCG64DXSM(self._child(_CHOICES)))

    def _child(self, *key: int) -> np.random.SeedSequence:
        if self.seed is None:
            return np.random.SeedSequence(secrets.randbits(256))
        return np.random.SeedSequence(self.seed, spawn_key=(self.rank, *key))

    def _entropy(self) -> int:
        """Return 128 bits for the code that reads the next records."""
        if self.seed is None:
            return secrets.randbits(128)  # a tenth of the time of a seed sequence
        return int.from_bytes(self._child(_ENTROPY, self._num_draws).generate_state(4).tobytes(), "little")

    def _records(self, own: NDArray[Any]) -> Draw:
        """Return the records of the units with these indices among the rank's units."""
        units = own * self.world_size + self.rank
        self._num_draws += 1
        entropy = self._entropy()
        if self.units is None:
            return Draw(units.tolist(), entropy=entropy, alone=self.alone)
        records, sizes = self.units.choose(units, self._choices)
        return Draw(records, sizes=sizes, entropy=entropy, alone=self.alone)

    def _parts(self, members: NDArray[Any]) -> Iterator[Draw]:
        """Yield the items of a logical batch; each member joins one of them, uniformly and independently."""
        if self.accumulate == 1:
            yield self._records(members)
            return
        part = self._rng.integers(self.accumulate, size=len(members))
        for number in range(self.accumulate):
            yield self._records(members[part == number])

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.seed is None:
            del state["_rng"], state["_choices"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_rng" not in state:
            self._start()


class PoissonBatchSampler(_PrivateBatchSampler):
    """A sampler in which every unit joins every logical batch independently with probability q.

        K ~ Binomial(own units, q);   the K members are a uniform subset without replacement

    Here q = expected_batch_size / dataset_size. This is the distribution of one coin per unit, at the cost of O(K)
    draws. A logical batch is split into ``accumulate`` consecutive items; each member joins one of them uniformly and
    independently.

    **Guarantee**: the union over ranks is one Poisson(q) sample of all units, independent between steps and passes.
    The number of items of a pass is a public constant, the same on every rank. Batch sizes and members are private.
    """

    def __iter__(self) -> Iterator[list[int]]:
        sample_rate = self.expected_batch_size / self.dataset_size
        for _ in range(self.steps_per_epoch):
            count = self._rng.binomial(self.num_own, sample_rate)
            yield from self._parts(self._rng.choice(self.num_own, size=count, replace=False))


class ShuffleBatchSampler(_PrivateBatchSampler):
    """A sampler in which every unit joins exactly one item of a pass, chosen uniformly and independently.

    Batch sizes vary around the expected batch size. A random permutation cut into batches of fixed size looks similar,
    but is not private in the same way: there, adding or removing one record moves all later ones, so many batches
    change by two records. Here exactly one batch of a pass changes, by exactly one unit.

    **Guarantee**: a unit contributes to one step of a pass. The step is uniform over the ``steps_per_epoch`` logical
    batches, independent of all other units and ranks, and drawn again in each pass. Batch sizes and members are
    private.
    """

    def __iter__(self) -> Iterator[list[int]]:
        for members in _bins(self._rng, len(self), self.num_own):
            yield self._records(members)


class CyclicBatchSampler(_PrivateBatchSampler):
    """A sampler with b = ``steps_per_epoch`` fixed groups of units; step t takes group t mod b.

    The group is drawn once, uniformly and independently of all other units. Every pass is the same, so a unit is used
    again after exactly b steps, as correlated noise requires.

    **Guarantee**: a unit takes part in the steps g, g + b, g + 2b, ... and in no other, for a g that does not depend on
    the data. Accounting claims no amplification, so it does not rely on a secret g, except under add-or-remove: a
    public assignment goes by position, and removing a record would shift all later ones to other groups. So by default
    the assignment is secret and never saved, and a process that resumes in mid-pass cannot know it.
    ``public_assignment`` fixes the assignment by a number that may be saved and published. Then only relations that
    keep the other records in place ("zero_out", "replace_one") hold. A new secret assignment may begin between two
    passes if the noise begins an empty history: within each block of C the separation is b, and no unit takes part more
    often.

    Args:
        public_assignment: seed of the assignment, the same for any number of ranks; ``None`` for a secret assignment.
        options: as for the other samplers.
    """

    def __init__(self, *, public_assignment: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.position = 0  # the logical step that the next pass begins with
        self.reproducible = public_assignment is not None or self.seed is not None
        if public_assignment is None:
            self._groups = list(_bins(self._rng, self.steps_per_epoch, self.num_own))
            return
        public = np.random.Generator(np.random.PCG64DXSM(np.random.SeedSequence(public_assignment)))
        own = slice(self.rank, None, self.world_size)
        self._groups = list(
            _grouped(public.integers(self.steps_per_epoch, size=self.dataset_size)[own], self.steps_per_epoch)
        )

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.position, self.position + self.steps_per_epoch):
            yield from self._parts(self._groups[step % self.steps_per_epoch])

    def __getstate__(self) -> dict[str, Any]:
        if not self.reproducible:
            raise TypeError(
                "A cyclic sampler with a secret assignment cannot be copied or pickled: the copy would hold the "
                "assignment, or go on with another one in mid-pass. Make a new loader."
            )
        return super().__getstate__()


def _bins(rng: np.random.Generator, num_bins: int, num: int) -> Iterator[NDArray[Any]]:
    """Assign the numbers 0, ..., num - 1 to bins at random, and yield the members of each bin."""
    return _grouped(rng.integers(num_bins, size=num), num_bins)


def _grouped(bins: NDArray[Any], num_bins: int) -> Iterator[NDArray[Any]]:
    order = np.argsort(bins, kind="stable")
    edges = np.searchsorted(bins[order], np.arange(num_bins + 1))
    for start, stop in itertools.pairwise(edges):
        yield order[start:stop]
