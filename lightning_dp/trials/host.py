"""Host: the adapter that runs the user's code in trials of the private step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_dp.sampling import PrivateDataLoader
from lightning_dp.sandbox.contents import Contents
from lightning_dp.sandbox.refilling import changed, put_back
from lightning_dp.system.torch_private import Layers
from lightning_dp.trials.records import TrainingRecords


class Host(ABC):
    """The adapter that runs the user's step; this base class calls no hooks around it.

    Args:
        loader: returns the private loader, which may be replaced during a fit.
        move: moves a collated batch to the device.
        world_size: ranks.
        limit: most samples of a microbatch, or None.
    """

    shows_progress = True
    """True if a progress bar may be shown."""
    skips = False
    """True if user code asked, in the last run, to skip the rest of the epoch."""
    has_transfer = False
    """True if hooks of the user take part in moving a batch to the device."""
    narrow = torch.float32
    """Narrowest floating-point dtype in which the step computes."""

    def __init__(
        self, loader: Callable[[], PrivateDataLoader], move: Callable[[Any], Any], *, world_size: int, limit: int | None
    ) -> None:
        self.training = TrainingRecords(loader, move, self._without_effect)
        self._world_size, self._limit = world_size, limit
        self.layers: Layers | None = None
        """Of the user's module, once they are known."""
        self._contents: Contents | None = None

    @property
    def batch_size(self) -> int:
        """Expected number of records in a real microbatch, at most the dataset size."""
        return self.training.batch_size(self._world_size, self._limit)

    def drawn_size(self, seed: int) -> int:
        """Return a number of records that a real microbatch may hold, the same one for the same seed."""
        return self.training.drawn_size(self._world_size, self._limit, seed)

    def records(self, num: int, seed: int = 0) -> list[Any]:
        """Return a few records from all over the training set, the same ones for the same seed."""
        return self.training.take(num, seed)

    def read(self, positions: list[int]) -> list[Any]:
        """Return the records at some positions."""
        with self._without_effect():
            return self.training.read(positions)

    def check_reading(self, seed: int) -> None:
        """Check that an item of the dataset is the same whatever else is read."""
        with self._without_effect():
            self.training.check_reading(seed)

    def check_order(self) -> None:
        """Check, at the beginning of a pass, that the records are where they were."""
        self.training.check_order()

    def held(self) -> list[tuple[Any, Any]]:
        """Return attributes and variables that steps may read, those of further objects too, with copies of now."""
        layers = [] if self.layers is None else map(vars, self.layers.now().own)
        self._contents = found = Contents([*self.attributes(), *layers], [], (), self._contents)
        return [(each.live, each.content) for each in found.holders.values() if each.has_names]

    @contextmanager
    def _without_effect(self) -> Iterator[None]:
        """Give attributes and variables back what they held, after records were read: a dataset may set them."""
        held = self.held()
        try:
            yield
        finally:
            put_back(changed(held).values())

    @abstractmethod
    def run(self, records: list[Any]) -> Any:
        """Collate records and run the user's step on them; return its output."""

    def begin(self, records: list[Any]) -> None:  # noqa: B027
        """Call the hooks that see a batch before the optimizer's step, in which ``run`` gets the same records."""

    @abstractmethod
    def loss_of(self, output: Any, count: int) -> Tensor | None:
        """Return the loss of an output as a scalar; None if the output holds no loss."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Back-propagate a loss, with the user's hooks before and after it."""

    @abstractmethod
    def rehearse(self, closure: Callable[[], Any]) -> None:
        """Step the one optimizer as the host does, on the gradient that the closure gives."""

    @abstractmethod
    def others(self) -> list[Any]:
        """Return the optimizers and schedulers."""

    def counters(self) -> Callable[[], AbstractContextManager[None]]:
        """Return a function that makes a context with the public counters of the batch that begins now."""
        return nullcontext

    def advance(self) -> None:  # noqa: B027
        """Let public counters go on to the next batch, until the state of before is restored."""

    def stay(self) -> None:  # noqa: B027
        """Give public counters back what they were when the trial began."""

    def attributes(self) -> list[Any]:
        """Return attributes of objects, in addition to the module, and variables, that the user's step may write:
        dictionaries, or views of them.
        """
        return []

    def saved(self) -> dict[str, Any]:
        """Return copies of what user code puts into a checkpoint, by its path."""
        return {}

    # ---------------------------------------------------------------- hooks around the step

    @property
    def stops(self) -> bool:
        """True if the last run asked for the end of training."""
        return False

    def skips_on(self, record: Any) -> bool:
        """Tell whether user code, given one record alone, asks to skip the rest of the epoch."""
        return False

    def end_batch(self, output: Any) -> None:  # noqa: B027
        """Call the hooks that end a batch."""

    @property
    def has_epoch_end(self) -> bool:
        """True if trials also run user hooks outside of batches, such as those between two epochs."""
        return False

    def end_epoch(self) -> None:  # noqa: B027
        """Call the hooks that end an epoch and begin the next."""
