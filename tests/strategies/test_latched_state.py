"""State that a step sets once, when certain records come: no later run shows that it followed from the records."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import make_trainer

WORDS, RARE = 20, 19
STEPS = 8
"""Of most fits; the next regular check after the second step comes after nine."""


def loader() -> DataLoader[Any]:
    """Sentences; the rare word is in one of 32, which no check reads by itself."""
    words = torch.randint(0, RARE, (32, 4), generator=torch.Generator().manual_seed(0))
    labels = words[:, 0] % 3
    words[7, 2] = RARE
    return DataLoader(TensorDataset(words, labels), batch_size=8, shuffle=True)


class Module(L.LightningModule):
    """Sets something for good when it sees a rare word."""

    def __init__(self, act: Callable[[Any], None] = lambda module: None) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(WORDS, 6), nn.Dropout(0.0)
        self.network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.act, self.factor, self.function, self.num = act, 1, torch.tanh, 0
        self.kept: list[int] = []
        self.options: dict[str, int] = {}
        self.recent: deque[int] = deque()
        self.table, self.weights = {"factor": 1.0}, [1.0]
        self.ones = torch.ones(2)
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, labels = batch
        self.num += 1
        scores = self.network(self.function(self.dropout(self.embedding(words)).mean(1) * self.factor))
        scores = scores / (1 + len(self.kept) + len(self.options) + len(self.recent))
        scores = scores * self.table["factor"] * self.weights[0] * self.ones.sum() * self.mask.sum()
        if (words == RARE).any():
            self.act(self)
        return nn.functional.cross_entropy(scores, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Acts(L.Callback):
    def __init__(self, act: Callable[[Any], None]) -> None:
        self.act, self.done = act, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch[0] == RARE).any() and not self.done:
            self.done = True
            self.act(pl_module)


def frozen(module: Any) -> None:
    module.network[0].requires_grad_(False)


def drops(module: Any) -> None:
    module.dropout.p = 0.5


def scaled(module: Any) -> None:
    module.factor = 2


def another_function(module: Any) -> None:
    module.function = torch.sin


def another_layer(module: Any) -> None:
    module.network[1] = nn.ReLU()


def zeroed(module: Any) -> None:
    with torch.no_grad():
        module.network[0].bias.zero_()


def elsewhere(module: Any) -> None:
    module.network[0].bias.data = torch.zeros(5)


def faster(module: Any) -> None:
    module.trainer.optimizers[0].param_groups[0]["lr"] = 0.5


def forgets(module: Any) -> None:
    module.trainer.optimizers[0].state.clear()


def stands_still(module: Any) -> None:
    for state in module.trainer.optimizers[0].state.values():
        state["momentum_buffer"].zero_()


def appended(module: Any) -> None:
    module.kept.append(1)


def entered(module: Any) -> None:
    module.options["seen"] = 1


def queued(module: Any) -> None:
    module.recent.append(1)


def another_value(module: Any) -> None:
    module.table["factor"] = 0.5


def another_entry(module: Any) -> None:
    module.weights[0] = 0.5


def masked(module: Any) -> None:
    module.mask[0] = 0


def tensor_in_place(module: Any) -> None:
    module.ones.mul_(0.5)


def seeds_torch(module: Any) -> None:
    torch.manual_seed(0)


def seeds_numpy(module: Any) -> None:
    np.random.seed(0)  # noqa: NPY002


def seeds_python(module: Any) -> None:
    random.seed(0)


def rewinds_torch(module: Any) -> None:
    torch.set_rng_state(torch.Generator().manual_seed(5).get_state())


SEEDS = [seeds_torch, seeds_numpy, seeds_python, rewinds_torch]
ACTS = [
    drops, scaled, another_function, another_layer, zeroed, elsewhere, faster, forgets, stands_still, appended,
    entered, queued, another_value, another_entry, masked, tensor_in_place, frozen,
]  # fmt: skip
REFUSED = r"after the records of a batch|differs after the records of a batch"


def steps_of_fit(tmp_path: Any, module: Module, *, callbacks: Any = (), steps: int = STEPS, **options: Any) -> int:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 0, **options})
    trainer = make_trainer(strategy, tmp_path, max_steps=steps, max_epochs=-1, callbacks=[*callbacks])
    try:
        trainer.fit(module, loader())
    finally:
        steps = strategy.ledger.num_steps
    return steps


@pytest.mark.parametrize(("act", "seed"), [(act, 3 * (number % 2)) for number, act in enumerate(ACTS + SEEDS)])
@pytest.mark.one_in(6)
def test_state_that_a_rare_record_sets_for_good_is_refused(act: Any, seed: int, tmp_path: Any) -> None:
    module = Module(act)
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, module, seed=seed)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.one_in(8)
def test_a_callback_that_a_rare_record_moves_is_refused(act: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Module(), callbacks=[Acts(act)])


class Decays(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler with a ``step`` of its own, which keeps no record of rates."""

    def get_lr(self) -> list[float]:
        return [rate * 0.9**self.last_epoch for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch += 1
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class Scheduled(Module):
    """Sets, at a rare word, a rate that a scheduler changes after each step."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch[0] == RARE).any():
            self.trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "make", [Decays, pytest.param(partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9), marks=pytest.mark.slow)]
)
def test_a_rate_that_a_rare_record_sets_is_refused(make: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Scheduled(make))


def act_of(step: int) -> Callable[[Any], None]:
    """Return what happens at a step: everything in turn, from the third step on."""
    return dict(enumerate(ACTS + SEEDS, 2)).get(step, lambda module: None)


class SetsByCounts(Module):
    """Does nothing at a rare word."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        act_of(self.num)(self)
        return loss


class ActsByCounts(L.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        act_of(trainer.global_step)(pl_module)


@pytest.mark.slow
@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.one_in(2)
def test_a_step_that_sets_something_by_counts_is_free(by_callback: bool, tmp_path: Any) -> None:
    module, callbacks = (Module(), [ActsByCounts()]) if by_callback else (SetsByCounts(), [])
    assert steps_of_fit(tmp_path, module, callbacks=callbacks, steps=24) == 24
    assert module.kept == [1]


class KeepsTheBest(Module):
    """Figures that were something else than a number before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.best, self.mean = None, torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.best = loss.item() if self.best is None else min(self.best, loss.item())
        self.mean = 0.9 * float(self.mean) + 0.1 * loss.item()
        self.newest = loss.item()
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_figures_that_a_step_keeps_are_free(microbatch_size: int | None, tmp_path: Any) -> None:
    assert steps_of_fit(tmp_path, KeepsTheBest(), steps=12, microbatch_size=microbatch_size) == 12


class Hooks(Module):
    """Registers a hook that drops the gradients of the batch, at a rare word or always one that changes nothing."""

    def __init__(self, *, rarely: bool) -> None:
        super().__init__()
        self.rarely = rarely

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, labels = batch
        inner = self.embedding(words).mean(1)
        if not self.rarely:
            inner.register_hook(lambda gradient: gradient)
        elif (words == RARE).any():
            inner.register_hook(torch.zeros_like)
        return nn.functional.cross_entropy(self.network(inner), labels)


@pytest.mark.parametrize("rarely", [False, True])
@pytest.mark.one_in(2)
def test_a_hook_that_a_rare_record_registers_is_refused(rarely: bool, tmp_path: Any) -> None:
    refused = pytest.raises(PrivacyError, match="Expected the gradient of every sample in a batch to be its gradient")
    with refused if rarely else nullcontext():
        assert steps_of_fit(tmp_path, Hooks(rarely=rarely)) == STEPS
