"""OwnLoading: each microbatch of a batch runs with what its own records have set as they were loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning_dp.sampling import LogicalBatch, collate_samples
from lightning_dp.sampling.randomness import fresh_randomness
from lightning_dp.sandbox.refilling import Value, changed, put_back
from lightning_dp.trials.host import Host


class OwnLoading:
    """The attributes and variables that a dataset or a collate function sets in this process, and a step may read.

    All microbatches of a batch are loaded before the first of them runs, and would run with what the last one has set:
    its records would move the gradients of others. So if loading has changed anything, each microbatch is loaded again
    before it runs, by itself and from the state of before.

    **Guarantee**: a microbatch runs with what its own records have set. NOT followed: streams, whose records cannot be
    read again, and what is changed within lists, sets, arrays and tensors.

    Args:
        host: knows the training set, and the attributes and variables.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._batch = LogicalBatch([])

    def hold(self) -> Callable[[], Mapping[Any, Value]]:
        """Take note of attributes and variables before records are read; return a function that returns those that this
        has changed, by a key each, with their values of before.
        """
        return partial(changed, self._host.held())

    def begin(self, batch: LogicalBatch, *, alone: bool = False) -> LogicalBatch:
        """Begin a batch, before it is moved; return it with its last microbatch loaded again if this is needed.

        Args:
            batch: an item of the private loader.
            alone: whether to cut it into microbatches of one unit each.
        """
        if alone and any(count > 1 for count, _ in batch.microbatches):
            put_back(batch.changed.values())
            batch = self._host.training.loader.one_by_one(batch)
        self._batch = batch
        if len(batch) > 1:
            count, given = batch.microbatches[-1]
            batch.microbatches[-1] = count, self.own(-1, given)
        return batch

    def own(self, number: int, given: Any) -> Any:
        """Return a microbatch, loaded again if this is needed.

        Args:
            number: of the microbatch, from the last one, which is -1.
            given: the microbatch as it was loaded with the others.
        """
        batch, training = self._batch, self._host.training
        if not batch.changed or not batch.draw:
            return given
        put_back(batch.changed.values())
        with fresh_randomness(batch.draw.entropy - number):
            return collate_samples(training.loader, training.read(batch.positions[number]))

    @contextmanager
    def series(self) -> Iterator[None]:
        """Run further microbatches within the context, after which what the last one has set is put back."""
        held = self._host.held() if self._batch.changed else []
        try:
            yield
        finally:
            put_back(changed(held).values())
