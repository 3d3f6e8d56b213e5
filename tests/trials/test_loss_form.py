"""The form of a loss, and when a new one is checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.sandbox.writes import When
from lightning_dp.trials.loss_form import EVERY, MOST, NEAR, LossForm
from lightning_dp.trials.real_losses import RealLosses
from lightning_dp.trials.written import Ran


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


def test_a_write_after_a_longer_pause_is_new() -> None:
    form, key = LossForm(), ("attribute", "factor")

    def new_at(*numbers: int) -> list[int]:
        found = [number for number in numbers if form.see_writes([key], When.FORWARD, number)]
        form.settle(by_check=True)
        return found

    assert new_at(0) == [0]
    assert new_at(1, 2, 4) == []
    assert new_at(20) == [20]
    assert new_at(23, 40) == []
    assert new_at(400) == [400]


def test_a_checked_write_that_comes_late_is_new() -> None:
    form, key = LossForm(), ("content", "queue")
    form.checked_at = 1
    form.note_writes([key])
    assert not form.see_writes([key], When.HELD, 2)
    assert form.see_writes([key], When.FORWARD, 9)


def chains() -> tuple[torch.Tensor, torch.Tensor]:
    """Two losses of as many operations that differ far from their ends."""
    x = torch.ones(3, requires_grad=True)
    one, other = x.clone(), x.exp()
    for _ in range(NEAR + 1):
        one, other = one.neg(), other.neg()
    return one, other


def test_far_operations_are_read_if_their_number_is_new() -> None:
    (one, other), form = chains(), LossForm()
    form.see(one, checked=True, num_operations=70)
    form.see(other, checked=False, num_operations=71)
    assert form.is_new


def test_far_operations_of_a_known_number_are_left_out() -> None:
    """Reading them would cost a microsecond each in every step; the calls of torch are watched instead."""
    (one, other), form = chains(), LossForm()
    form.see(one, checked=True, num_operations=70)
    form.see(other, checked=False, num_operations=70)
    assert not form.is_new


def calls(form: LossForm, change: Callable[[torch.Tensor], Any], **how: Any) -> bool:
    """Run a change of plain data in a batch, and tell whether it is new."""
    with form.watching(**how):
        change(torch.ones(3, 4).abs())
    return form.is_new


KNOWN = [lambda x: x.mean(1).exp(), lambda x: x[:, 0].exp(), lambda x: x.view(3, 4).exp(), lambda x: x.exp()]
OTHER = [lambda x: x.mean(0).exp(), lambda x: x[0].exp(), lambda x: x.T.exp(), lambda x: x.numpy()]


@pytest.mark.parametrize(("known", "other"), [*zip(KNOWN, OTHER, strict=True)])
def test_calls_on_plain_data_are_new_until_settled(known: Any, other: Any) -> None:
    form = LossForm()
    calls(form, known, checked=True)
    assert not calls(form, known, kind=3)
    assert calls(form, other, kind=3, always=True)
    form.settle(by_check=False)
    assert form.is_due(since=1)
    form.settle(by_check=True)
    assert not calls(form, other, kind=3, always=True)


def test_calls_are_watched_in_a_new_kind_and_in_time() -> None:
    form = LossForm()
    calls(form, KNOWN[0], checked=True)
    calls(form, KNOWN[0], kind=3)
    assert [calls(form, OTHER[0], kind=3) for _ in range(EVERY)] == [False] * (EVERY - 1) + [True]
    form.settle(by_check=True)
    assert calls(form, OTHER[1], kind=4)


def test_sizes_logs_and_calls_after_the_loss_are_not_watched() -> None:
    x, form = torch.ones(3, requires_grad=True), LossForm()
    calls(form, lambda rows: rows.sum(), checked=True)

    def change(rows: torch.Tensor) -> None:
        rows.detach().clone().squeeze().sum()
        assert rows.shape[0] == rows.size(0)
        form.see(x, checked=False)
        rows.exp().cos()

    assert not calls(form, change, always=True)


def test_a_known_operation_over_another_dimension_is_new() -> None:
    x, form = torch.ones(3, 3, requires_grad=True), LossForm()
    form.see(x.softmax(1).sum(), checked=True)
    form.see(x.softmax(1).sum(), checked=False)
    assert not form.is_new
    form.see(x.softmax(0).sum(), checked=False)
    assert form.is_new


def test_a_loss_without_a_graph_has_no_form() -> None:
    form = LossForm()
    form.see(torch.zeros(()), checked=False)
    assert not form.is_new


def test_recorded_operations_have_the_form_of_plain_ones() -> None:
    """What the engine adds to a graph would make every form new, and run the checks in vain."""
    layer, form = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)), LossForm()
    rows = torch.randn(2, 3)
    form.see(layer(rows).mean(), checked=True)
    engine = PerSampleEngine(layer)
    engine.attach()
    engine.set_parameters(dict(layer.named_parameters()))
    engine.learn_layout(lambda size: layer(rows.repeat(3, 1)[:size]))
    engine.begin(2)
    loss = layer(rows).mean()
    form.see(loss, checked=False)
    engine.end()
    assert loss.grad_fn is not None
    assert not form.is_new


def test_ranks_agree_on_a_check_of_a_new_form() -> None:
    """A rank that checked alone would wait for the others in the comparison of ranks."""
    asked: list[int] = []
    reduction = SimpleNamespace(world_size=2, is_sharded=False, agree=lambda flag: asked.append(flag) or len(asked) < 6)
    step = SimpleNamespace(state=SimpleNamespace(step=5), reduction=reduction, runs_samples_alone=False)
    runs: Any = SimpleNamespace(loss_form=LossForm(), exchanged=None, step=step)
    look: Any = SimpleNamespace(numbers_back_in=nullcontext)
    batches, watch = [Ran([], look, nullcontext)], SimpleNamespace(aside=nullcontext)
    written: Any = SimpleNamespace(batches=batches, watch=watch, check=lambda seed, _: asked.append(seed))
    losses = RealLosses(runs, written, sandbox=None, check_again=lambda number, _: asked.append(number))  # type: ignore
    losses.check()
    assert asked == [False, False, 5, False, 5, False]
