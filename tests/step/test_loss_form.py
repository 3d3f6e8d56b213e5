"""The form of a loss, and when a new one is checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lightning_dp.step.loss_form import MOST, NEAR, LossForm
from lightning_dp.step.trial import Trial


def test_new_operations_are_due_until_settled() -> None:
    x, form = torch.ones(3, requires_grad=True), LossForm()
    form.see((x * 2).sum(), checked=True)
    form.see((x * 3).sum(), checked=False)
    assert not form.is_due(since=1)
    form.see((x * 3).exp().sum(), checked=False)
    assert form.is_due(since=1)
    form.settle(by_check=True)
    form.see((x * 5).exp().sum(), checked=False)
    assert not form.is_new


def test_after_many_new_forms_checks_are_rarer() -> None:
    x, form = torch.ones(3, requires_grad=True), LossForm()
    forms = (torch.exp, torch.sin, torch.cos, torch.tanh, torch.erf, torch.abs, torch.sqrt, torch.square, torch.log)
    assert len(forms) == MOST + 1
    for number, change in enumerate(forms):
        form.see(change(x).sum(), checked=False)
        assert form.is_due(since=1) == (number < MOST)
        assert form.is_due(since=100)
        form.settle(by_check=True)


def test_operations_far_from_the_loss_are_not_read() -> None:
    x, form = torch.ones(3, requires_grad=True), LossForm()
    deep, other = x.clone(), x.exp()
    for _ in range(NEAR + 1):
        deep, other = deep.neg(), other.neg()
    form.see(deep, checked=True)
    form.see(other, checked=False)
    assert not form.is_new
    form.see(torch.zeros(()), checked=False)
    assert not form.is_new


def test_ranks_agree_on_a_check_of_a_new_form() -> None:
    """A rank that checked alone would wait for the others in the comparison of ranks."""
    asked: list[int] = []
    trial: Any = object.__new__(Trial)
    reduction = SimpleNamespace(world_size=2, agree=lambda flag: asked.append(flag) or True)
    trial._step = SimpleNamespace(state=SimpleNamespace(step=5), reduction=reduction)
    trial._runs, trial._checked_at, trial.check_again = SimpleNamespace(loss_form=LossForm()), 0, asked.append
    trial.check_new_loss(first_of_pass=False)
    assert asked == []
    trial.check_new_loss(first_of_pass=True)
    assert asked == [False, 5]
