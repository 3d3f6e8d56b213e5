"""Writes of data outside of the forward, or within attributes, that begin between two of the regular checks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.trial import Trial
from tests.helpers import make_trainer

BEGINS, PLANNED = 14, 25


class Module(L.LightningModule):
    """Keeps the mean of a batch; subclasses use it from a step on."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
        self.batches = 0

    @property
    def begun(self) -> bool:
        return self.global_step >= BEGINS

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches += 1
        self.seen = batch[0].mean()
        loss: Tensor = self.network(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def move(self) -> None:
        with torch.no_grad():
            self.network[0].weight.add_(self.seen)


class EditsGradients(Module):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.begun:
            self.network[0].weight.grad.add_(self.seen)  # type: ignore[union-attr,operator]


class ReplacesGradients(Module):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.begun:
            self.network[0].weight.grad = torch.ones(8, 4) * self.seen


class MovesAfterTheStep(Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.begun:
            self.move()


class MovesInAHookOfTheOptimizer(Module):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.move() if self.begun else None)
        return optimizer


class RateByFigures(Module):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()

        def factor(epoch: int) -> float:
            return float(self.trainer.callback_metrics["loss"]) if epoch > BEGINS else 1.0

        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}]


AFTER = [EditsGradients, ReplacesGradients, MovesAfterTheStep, MovesInAHookOfTheOptimizer, RateByFigures]


def fit(module: L.LightningModule) -> tuple[int, str]:
    """Number of released steps, and what stopped the run."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(100, 4)), batch_size=10)
    strategy = DPStrategy(noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-3)
    try:
        make_trainer(strategy, None, max_epochs=-1, max_steps=PLANNED).fit(module, data)
    except PrivacyError as error:
        return strategy.steps_taken, str(error)
    return strategy.steps_taken, ""


@pytest.mark.parametrize("kind", AFTER)
@pytest.mark.one_in(4)
def test_a_write_after_a_release_is_refused_one_step_late(kind: type[Module]) -> None:
    steps, error = fit(kind())
    assert steps == BEGINS + 1
    assert "with another value after another record" in error
    assert "in the step before this one, which was released" in error


class Refreshes(Module):
    """What the loss reads is a running mean as it was some steps ago."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        self.running = 0.9 * getattr(self, "running", 0.0) + 0.1 * self.seen
        if self.batches == BEGINS + 1:
            self.used = self.running
        loss: Tensor = self.network(batch[0] - getattr(self, "used", 0.0)).square().mean()
        return loss


class Scales(Module):
    """By one entry of one record of the batch, which an exchange of two others does not change."""

    def __init__(self, extreme: Any) -> None:
        super().__init__()
        self.extreme = extreme

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = self.extreme(map(float, batch[0][:, 0].tolist())) if self.begun else 1.0
        return super().training_step([batch[0] * factor], batch_idx)


@pytest.mark.parametrize("extreme", [max, min])
@pytest.mark.one_in(2)
def test_an_extreme_of_the_batch_that_is_used_later_is_refused(extreme: Any) -> None:
    steps, error = fit(Scales(extreme))
    assert BEGINS <= steps <= 20
    assert "One sample of a batch was" in error


class Assigns(Module):
    """Once, by a counter of its own, and without a change that torch would count."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.batches == BEGINS + 1:
            self.network[3].bias.data = batch[0][0, :3].clone()
        return loss


class SetsTheRateOfADropout(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.begun:
            self.network[1].p = float(self.seen.abs().clamp(max=0.9))
        return loss


class KeepsInALayerOfTorch(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        before = getattr(self.network[0], "seen", 0.0)
        loss = super().training_step([batch[0] - before], batch_idx)
        if self.begun:
            self.network[0].seen = self.seen
        return loss


@pytest.mark.parametrize("kind", [Refreshes, Assigns, SetsTheRateOfADropout, KeepsInALayerOfTorch])
@pytest.mark.one_in(2)
def test_a_write_in_the_forward_is_refused_in_time(kind: type[Module]) -> None:
    steps, error = fit(kind())
    assert steps == BEGINS
    assert "after another record" in error
    assert "was released" not in error


class FreezesInAHook(Module):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.begun:
            self.network[0].weight.requires_grad_(bool(batch[0][0, 0] > 5))


def test_data_that_decide_what_trains_are_refused_in_time() -> None:
    steps, error = fit(FreezesInAHook())
    assert steps == BEGINS
    assert "'network.0.weight.requires_grad' with another value after a record of extreme values" in error


class Limits(Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if loss.detach() < 1e6 and self.what == "steps":
            self.trainer.fit_loop.epoch_loop.max_steps = 3
        elif loss.detach() < 1e6:
            self.trainer.fit_loop.max_epochs = 1
        return loss


@pytest.mark.parametrize("what", ["steps", "epochs"])
def test_limits_of_the_run_stay_while_it_runs(what: str) -> None:
    steps, error = fit(Limits(what))
    assert steps == 0
    assert "to stay while training, got a change by Limits.training_step" in error


class Free(Module):
    """Counts, decays and follows the weights."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.temperature = 1.0 / (1 + self.batches)
        self.losses = [*getattr(self, "losses", []), self.seen]
        return loss * (1 + self.temperature)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.begun:
            self.network[0].weight.grad.mul_(0.5)  # type: ignore[union-attr,operator]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.slow
def test_writes_of_counts_and_weights_cost_few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = Trial.check_again

    def counting(self: Trial, number: int, positions: list[int] | None = None) -> None:
        checked.append(number)
        check(self, number, positions)

    monkeypatch.setattr(Trial, "check_again", counting)
    assert fit(Module()) == (PLANNED, "")
    assert checked == [1, 9]
    checked.clear()
    assert fit(Free()) == (PLANNED, "")
    said = "those of public state, of the scheduler after a longer pause than before, and of the edit"
    assert checked == [1, 9, 10, BEGINS + 1], said
