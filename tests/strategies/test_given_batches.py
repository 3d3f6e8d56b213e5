"""Hooks that change a batch or a loss in place before its gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies import test_latched_state
from tests.strategies.test_latched_state import RARE, STEPS, loader


class Module(test_latched_state.Module):
    """Zeroes a batch with a rare word before the step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (batch[0] == RARE).any():
            batch[0].zero_()


def fit(module: Any, data: Any, tmp_path: Any, *callbacks: L.Callback, **options: Any) -> DPStrategy:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 3, **options})
    make_trainer(strategy, tmp_path, max_steps=STEPS, max_epochs=-1, callbacks=[*callbacks]).fit(module, data)
    return strategy


def swap(batch: Any) -> None:
    batch[0].copy_(batch[0].flip(0))


def mix(batch: Any) -> None:
    batch[0] = 0.5 * batch[0] + 0.5 * batch[0].flip(0)


def weigh(batch: Any) -> None:
    batch.append(float(batch[0].mean()))


@pytest.mark.parametrize("change", [swap, mix, weigh])
def test_a_callback_may_not_change_a_batch(change: Callable[[Any], None], tmp_path: Any) -> None:
    callback = L.pytorch.callbacks.LambdaCallback(on_train_batch_start=lambda trainer, module, batch, _: change(batch))
    with pytest.raises(PrivacyError, match=r"LambdaCallback\.on_train_batch_start to leave batches and losses"):
        fit(Classifier(), make_loader(), tmp_path, callback)


def test_a_callback_may_not_change_a_loss(tmp_path: Any) -> None:
    class Scales(L.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            loss.mul_(float(loss.detach()) > 0.1)

    with pytest.raises(PrivacyError, match=r"Scales\.on_before_backward to leave batches and losses as they are"):
        fit(Classifier(), make_loader(), tmp_path, Scales())


def test_a_callback_may_read_batches_and_losses(tmp_path: Any) -> None:
    seen: list[float] = []

    class Reads(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(float(batch[0].sum()))

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            seen.append(float(loss.detach()))

    assert fit(Classifier(), make_loader(), tmp_path, Reads()).ledger.num_steps == STEPS
    assert len(seen) == 2 * STEPS


def test_a_rare_batch_that_a_module_changes_is_compared(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="when run alone"):
        fit(Module(), loader(), tmp_path)


def test_a_rare_microbatch_that_a_transfer_changes_is_compared(tmp_path: Any) -> None:
    """The rare word comes once, not in the last microbatch of its batch, whose transfer the step watches as well."""

    class Moves(test_latched_state.Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0 if (batch[0] == RARE).any() else batch[0], batch[1]]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.network(self.embedding(batch[0]).mean(1)), batch[1])

    with pytest.raises(PrivacyError, match="when run alone"):
        fit(Moves(), loader(), tmp_path, microbatch_size=2, seed=0)
