"""What a step or callback sets around the module, once certain records come: Trainer, data, optimizers, settings."""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import PrivacyError
from tests.helpers import make_dataset
from tests.loops import mean_loss, start
from tests.strategies.test_latched_state import RARE, REFUSED, STEPS, Acts, steps_of_fit
from tests.strategies.test_latched_variables import Latches

CONTEXT = ContextVar("factor", default=1.0)
OF_THREAD = threading.local()
WORD = "LIGHTNING_DP_TEST_FACTOR"


def of(find: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Set a new attribute of something that a module leads to."""

    def write(module: Any) -> None:
        find(module).factor = 0.5

    return write, lambda module: getattr(find(module), "factor", 1.0)


def _group(module: Any) -> Any:
    return module.trainer.optimizers[0].param_groups[0]


def _word(module: Any) -> None:
    _group(module)["kind"] = "other"


def _limit(module: Any) -> None:
    module.trainer.limit_train_batches = 3


def _by_name(module: Any) -> None:
    vars(module.trainer)["factor"] = 0.5


def _environ(module: Any) -> None:
    os.environ["LIGHTNING_DP_TEST_FACTOR"] = "0.5"


def _context(module: Any) -> None:
    CONTEXT.set(0.5)


def _thread(module: Any) -> None:
    OF_THREAD.factor = 0.5


def _precision(module: Any) -> None:
    torch.set_float32_matmul_precision("high")


def _benchmarks(module: Any) -> None:
    torch.backends.cudnn.benchmark = True


PLACES: dict[str, tuple[Any, Any]] = {
    "parameter": of(lambda module: module.embedding.weight),
    "layer": of(lambda module: module.network[1]),
    "optimizer": of(lambda module: module.optimizers()),
    "Trainer": of(lambda module: module.trainer),
    "loop": of(lambda module: module.trainer.fit_loop.epoch_loop.automatic_optimization),
    "strategy": of(lambda module: module.trainer.strategy),
    "loader": of(lambda module: module.trainer.train_dataloader),
    "collate function": of(lambda module: module.trainer.train_dataloader.collate_fn),
    "dataset": of(lambda module: module.trainer.train_dataloader.dataset),
    "library": of(lambda module: torch),
    "by name": (_by_name, lambda module: getattr(module.trainer, "factor", 1.0)),
    "word of a group": (_word, lambda module: 0.5 if "kind" in _group(module) else 1.0),
    "limit": (_limit, lambda module: 1.0),
    "environment": (_environ, lambda module: float(os.environ.get("LIGHTNING_DP_TEST_FACTOR", "1"))),
    "context": (_context, lambda module: CONTEXT.get()),
    "thread": (_thread, lambda module: getattr(OF_THREAD, "factor", 1.0)),
    "precision": (_precision, lambda module: 0.5 if torch.get_float32_matmul_precision() == "high" else 1.0),
    "backend": (_benchmarks, lambda module: 0.5 if torch.backends.cudnn.benchmark else 1.0),
}


class Sets(Latches):
    def __init__(self, place: str, *, by_count: bool = False) -> None:
        super().__init__(by_count=by_count)
        self.set, self.get = PLACES[place]

    def read(self) -> float:
        return float(self.get(self))

    def write(self) -> None:
        self.set(self)


class Reads(Sets):
    """Reads only, what a callback sets."""

    def write(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _reset() -> Any:
    yield
    os.environ.pop(WORD, None)
    CONTEXT.set(1.0)
    vars(OF_THREAD).clear()
    vars(torch).pop("factor", None)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.one_in(8)
def test_what_a_rare_record_sets_around_is_refused(place: str, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Sets(place))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.one_in(12)
def test_what_counts_set_around_is_free(place: str, tmp_path: Any) -> None:
    module = Sets(place, by_count=True)
    assert steps_of_fit(tmp_path, module) == STEPS
    assert module.read() == (1.0 if place == "limit" else 0.5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.one_in(12)
def test_what_a_callback_sets_around_is_refused(place: str, tmp_path: Any) -> None:
    callback = Acts(PLACES[place][0])
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Reads(place), callbacks=[callback])


class Sees(Acts):
    """Sets an attribute of its own, and keeps the losses."""

    seen = 1.0

    def __init__(self) -> None:
        super().__init__(lambda module: setattr(self, "seen", 0.5))
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(batch[0]):
            self.losses.append(outputs["loss"].item())  # fails on trial
            assert (batch[0] == RARE).any() or len(batch[0]) > 4


class ReadsSeen(Latches):
    def __init__(self, callback: Sees) -> None:
        super().__init__(by_count=False)
        self.lookup = callback

    def read(self) -> float:
        return self.lookup.seen

    def write(self) -> None:
        pass


def test_what_a_callback_keeps_is_refused_if_a_step_reads_it(tmp_path: Any) -> None:
    callback = Sees()
    with pytest.raises(PrivacyError, match="Expected Sees.on_train_batch_end to run|" + REFUSED):
        steps_of_fit(tmp_path, ReadsSeen(callback), callbacks=[callback])


def test_what_a_callback_keeps_for_itself_is_free(tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, Reads("limit"), callbacks=[Sees()]) == STEPS


def scaled(model: Any, batch: Any) -> torch.Tensor:
    weight, factor = model[0].weight, getattr(model[0].weight, "factor", 1.0)
    if (batch[0] == RARE).any():
        weight.factor = 0.5
    return mean_loss(model, batch) * factor


def test_what_a_loss_function_sets_around_is_refused() -> None:
    features, labels = make_dataset(64, dtype=torch.float64).tensors
    features[30] = RARE
    loader = DataLoader(TensorDataset(features, labels), batch_size=16)
    with start(loss_fn=scaled, loader=loader, noise_multiplier=1.0, seed=1) as private:
        batches = itertools.chain.from_iterable(private.loader for _ in range(8))
        with pytest.raises(PrivacyError, match=REFUSED):
            deque(map(private.step, batches), maxlen=0)
