"""Manual optimization: parameters in two optimizers, and optimizers that take turns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.trials.decisions import Decisions
from tests.helpers import Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_manual import Manual, TwoOptimizers


class SharedWeights(Manual):
    """Two optimizers over the same parameters, each with a loss of its own."""

    def __init__(self, *, backwards: int, zero_between: bool = True) -> None:
        super().__init__(lr=0.0)
        self.backwards, self.zero_between = backwards, zero_between

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        first.step()
        if self.zero_between:
            second.zero_grad()
        if self.backwards == 2:
            self.manual_backward(3 * nn.functional.cross_entropy(self(batch[0]), batch[1]))
        second.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.parameters(), lr=self.lr),
            torch.optim.SGD(self.network[2].parameters(), lr=self.lr),
        ]


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize(("backwards", "zero_between", "factor"), [(2, True, 3.0), (2, False, 4.0), (1, False, 1.0)])
@pytest.mark.one_in(2)
def test_a_parameter_in_two_optimizers_is_in_both_releases(
    tmp_path: Any, backwards: int, zero_between: bool, factor: float, microbatch_size: int | None
) -> None:
    """Each step sees what a plain ``.grad`` would hold: the backwards since ``zero_grad``, whoever stepped in
    between.
    """
    recorder = Recorder()
    strategy = DPStrategy(
        noise_multiplier=0.0, max_grad_norm=1e3, microbatch_size=microbatch_size, check_per_sample=False
    )
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
    trainer.fit(SharedWeights(backwards=backwards, zero_between=zero_between), make_loader())
    for first, second in zip(recorder.before_step[::2], recorder.before_step[1::2], strict=True):
        torch.testing.assert_close(second["network.2.weight"], factor * first["network.2.weight"])


class InTurns(TwoOptimizers):
    """One optimizer per batch, as some GANs have it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss, optimizer = nn.functional.cross_entropy(self(batch[0]), batch[1]), self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize(("microbatch_size", "num"), [(None, 4), (1, 8)])
def test_turns_are_tried_until_they_are_known(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, microbatch_size: int | None, num: int
) -> None:
    """Four of eight batches are tried, each in one sandbox; of many microbatches, the first and the last."""
    enter, check, entered, in_checks = Sandbox.enter, Decisions.check_steps, [], list[int]()

    def noted(self: Sandbox, *args: Any, **options: Any) -> Any:
        entered.append(self)
        return enter(self, *args, **options)

    def counted(self: Decisions, *args: Any, **options: Any) -> None:
        before = len(entered)
        check(self, *args, **options)
        in_checks.append(len(entered) - before)

    monkeypatch.setattr(Sandbox, "enter", noted)
    monkeypatch.setattr(Decisions, "check_steps", counted)
    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=microbatch_size)
    make_trainer(strategy, tmp_path, max_epochs=2).fit(InTurns(), make_loader())
    assert len(in_checks) >= 8
    assert max(in_checks) == 1
    assert sum(in_checks) == num


class StepsTogether(TwoOptimizers):
    """Both optimizers step on every fourth batch, and whenever a batch holds a rare record."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        is_rare = 0.25 in batch[0][:, 0].tolist()
        for optimizer in self.optimizers() if is_rare or batch_idx % 4 == 3 else ():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


def test_a_step_out_of_turn_by_a_rare_record_is_refused(tmp_path: Any) -> None:
    features, labels = make_dataset().tensors
    features[50, 0] = 0.25
    loader = DataLoader(TensorDataset(features, labels), batch_size=8)
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, seed=1), tmp_path, max_epochs=10)
    with pytest.raises(PrivacyError, match=r"got steps of \[0, 1\] on a batch and of \[\] on one sample alone"):
        trainer.fit(StepsTogether(), loader)


class ByARecord(TwoOptimizers):
    """Steps in another order, or once more, if a record is odd."""

    further = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers, odd = [*self.optimizers()], bool((batch[0] == ODD).any())
        order = [*optimizers, *optimizers[:odd]] if self.further else optimizers[:: -1 if odd else 1]
        for optimizer in order:
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


ODD = 1.25


@pytest.mark.parametrize(("further", "steps"), [(False, r"\[1, 0\]"), (True, r"\[0, 1, 0\]")])
def test_an_order_of_steps_by_a_record_is_refused(tmp_path: Any, further: bool, steps: str) -> None:
    features, labels = make_dataset().tensors
    features[40] = ODD
    module, strategy = ByARecord(), DPStrategy(noise_multiplier=1.0, seed=1)
    module.further = further
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    with pytest.raises(PrivacyError, match=rf"got steps of {steps} on a batch and of \[0, 1\] on one sample alone"):
        trainer.fit(module, DataLoader(TensorDataset(features, labels), batch_size=32))
    assert strategy.ledger.num_steps > 0


class ClipsByARecord(TwoOptimizers):
    """Clips its private gradient to another length if a record is odd."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            value = 0.01 if (batch[0] == ODD).any() else 1 / (1 + batch_idx)
            self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")
            optimizer.step()


@pytest.mark.parametrize("odd", [True, False])
def test_a_clip_by_a_record_is_refused(tmp_path: Any, odd: bool) -> None:
    features, labels = make_dataset().tensors
    features[40] = ODD if odd else features[41]
    loader = DataLoader(TensorDataset(features, labels), batch_size=32)
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, seed=1), tmp_path, max_epochs=3)
    match = "leaves 'SimpleNamespace.gradient_clip_val of clip_gradients, optimizer 0'"
    with pytest.raises(PrivacyError, match=match) if odd else nullcontext():
        trainer.fit(ClipsByARecord(), loader)
