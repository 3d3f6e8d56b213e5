"""Hooks and callbacks that would break the guarantee: refused, or without effect on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_FEATURES, Classifier, make_loader, make_trainer
from tests.strategies.test_attacks import Attack, cross_entropy, fit


class Hooked(Attack):
    """Writes state from the batch, or from what a step kept of it, in a hook in place of the step."""

    kept: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = batch[0].detach()
        return cross_entropy(self, [batch[0] + self.hidden, batch[1]])


HOOKS: dict[str, Callable[..., Any]] = {
    "on_train_batch_start": lambda self, batch, batch_idx: self.saved.copy_(batch[0].mean(0)),
    "on_train_batch_end": lambda self, outputs, batch, batch_idx: self.saved.copy_(batch[0].mean(0)),
    "on_before_backward": lambda self, loss: self.saved.fill_(float(loss.detach())),
    "on_after_backward": lambda self: self.hidden.copy_(self.kept.mean(0)),
    "on_train_epoch_end": lambda self: self.frozen.data.copy_(self.kept.mean(0)),
}


def _discard(value: object) -> None:
    return None


@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.one_in(2)
def test_state_written_in_a_hook_is_refused(hook: str, microbatch_size: int | None, tmp_path: Any) -> None:
    module = type("OfModule", (Hooked,), {hook: lambda self, *args: _discard(HOOKS[hook](self, *args))})()
    with pytest.raises(PrivacyError, match=r"with another value after|changes with what training_step saw"):
        fit(module, tmp_path, microbatch_size=microbatch_size)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.one_in(2)
def test_state_written_by_a_callback_is_refused(hook: str, tmp_path: Any) -> None:
    def write(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        HOOKS[hook](module, *args)

    callback = type("Writes", (L.Callback,), {hook: write})()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match=r"with another value after|changes with what training_step saw"):
        make_trainer(strategy, tmp_path, callbacks=[callback]).fit(Hooked(), make_loader())


def test_a_statistic_of_the_batch_from_a_hook_is_refused(tmp_path: Any) -> None:
    class Centred(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.mean = batch[0].mean(0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self, [batch[0] - self.mean, batch[1]])

    with pytest.raises(PrivacyError, match=r"influence each other|when run alone"):
        fit(Centred(), tmp_path)


def test_state_written_by_a_lambda_callback_is_refused(tmp_path: Any) -> None:
    def write(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.saved.copy_(batch[0].mean(0))

    callback = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=write)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match="with another value after"):
        make_trainer(strategy, tmp_path, callbacks=[callback]).fit(Hooked(), make_loader())
    assert callback.on_train_batch_end is write


@pytest.mark.parametrize("since", [0, 1, 3])
@pytest.mark.one_in(3)
def test_an_epoch_that_the_data_cut_short_is_refused(since: int, tmp_path: Any) -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx >= since and float(batch[0].abs().max()) > 2.0 else None

    with pytest.raises(PrivacyError, match=r"answer of on_train_batch_start|on_train_batch_start to skip"):
        fit(Skipping(), tmp_path, epochs=3)


@pytest.mark.slow
def test_an_epoch_that_a_count_cuts_short_is_free(tmp_path: Any) -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx >= 2 else None

    assert fit(Skipping(), tmp_path, epochs=2).ledger.num_steps == 4


def test_callbacks_run_in_real_batches_only(tmp_path: Any) -> None:
    lines: list[float] = []

    class Prints(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            lines.append(float(outputs["loss"]))

    callback = Prints()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[callback]).fit(Classifier(), make_loader())
    assert len(lines) == 8
    assert "on_train_batch_end" not in vars(callback)


@pytest.mark.slow
def test_a_callback_that_follows_the_weights_is_free(tmp_path: Any) -> None:
    """It writes into the module, is tried once it does, and is left as it was by that."""

    class Follows(L.Callback):
        count = 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.count += 1
            module.frozen.data.mul_(0.9).add_(module.network[0].weight.detach()[0], alpha=0.1)

    callback = Follows()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[callback]).fit(Hooked(), make_loader())
    assert (callback.count, strategy.ledger.num_steps) == (8, 8)


class Momentum(Classifier):
    """A teacher that follows the student's weights alone, and an output list: both are free."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(NUM_FEATURES, 5).requires_grad_(False)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for old, new in zip(self.teacher.parameters(), self.network[0].parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.detach())
        return loss + (self.network[0](batch[0]) - self.teacher(batch[0])).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 5, 1])
def test_a_teacher_that_follows_the_weights_is_free(tmp_path: Any, microbatch_size: int | None) -> None:
    module = Momentum()
    assert fit(module, tmp_path, microbatch_size=microbatch_size).ledger.num_steps == 4
    assert len(module.seen) == 4
