"""Values that user code reads from tensors, as they are noted."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import PrivacyError
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness
from lightning_dp.sandbox.readings import Readings, restore
from lightning_dp.trials.firsts import MOST, MOST_AT_ONCE, Firsts
from tests.helpers import make_dataset
from tests.loops import mean_loss, start, train


def values_of(read: Callable[[Tensor], Any], *values: float) -> int:
    """Return how many different values one line reads."""
    with Readings() as readings:
        for value in values:
            read(torch.tensor(value))
    return len(readings.take())


@pytest.mark.parametrize("read", [bool, int, float, lambda it: it.item(), lambda it: range(9)[it], lambda it: f"{it}"])
def test_a_value_is_noted_however_it_is_read(read: Callable[[Tensor], Any]) -> None:
    assert values_of(read, 0, 1) == 2


@pytest.mark.parametrize(
    ("values", "num"),
    [
        ((0, 1, 2, -1), 4), ((100, 101, 110), 1), ((100, 200), 2), ((0.0, 1.0), 2), ((2.5, 3.5), 1), ((2.5, 300.5), 2),
        ((torch.nan, torch.inf, -torch.inf), 3), ((1j, 2j), 1), ((1e30, 1e35), 2),
    ],
)  # fmt: skip
def test_values_differ_by_their_size(values: Any, num: int) -> None:
    assert values_of(lambda tensor: tensor.item(), *values) == num


@pytest.mark.parametrize(
    "read",
    [
        lambda it: it.tolist(), lambda it: it.numpy(), np.asarray, lambda it: np.from_dlpack(it),
        lambda it: (it > 1).nonzero(), lambda it: it[it > 1], lambda it: it[1:, None][it[1:] > 1],
        lambda it: torch.where(it > 1), lambda it: torch.argwhere(it > 1), lambda it: it.masked_select(it > 1),
        lambda it: it.unique(), lambda it: torch.unique(it, return_counts=True), lambda it: torch.bincount(it),
        lambda it: it.sort()[0].unique_consecutive(), lambda it: it.repeat(2, 1).unique(dim=1),
        lambda it: nn.functional.one_hot(it),
        lambda it: it.repeat_interleave(it), lambda it: torch.repeat_interleave(it, repeats=it),
        lambda it: torch.equal(it, it.clamp(max=1)), lambda it: it.allclose(it.clamp(max=1)),
    ],
)  # fmt: skip
def test_what_shows_a_rare_entry_is_noted(read: Callable[[Tensor], Any]) -> None:
    with Readings() as readings:
        one, same, rare = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), torch.tensor([0, 1, 7])
        found = []
        for entries in (one, same, rare):
            read(entries)
            found.append(readings.take())
    assert found[0] == found[1]
    assert found[2] - found[0]


def test_few_rows_that_a_mask_leaves_out_are_noted() -> None:
    with Readings() as readings:
        found = []
        for entries in (torch.zeros(15), torch.zeros(14), torch.eye(15)[0]):
            _ = entries[entries == 0]
            found.append(readings.take())
    assert found[0] == found[1]
    assert found[2] - found[0]


def test_rows_are_noted_of_operations_of_users_alone() -> None:
    rows = torch.randn(3, 2)
    with Readings() as readings, FrozenRandomness():
        _ = rows[rows[:, 0] == 2.0]
    assert {line[0] for line, _ in readings.take()} == {__file__}
    ours: Any = types.FunctionType((lambda it: it[it[:, 0] == 2.0]).__code__, {"__name__": "lightning_dp.layer"})
    with Readings() as readings:
        ours(rows)
    assert not readings.take()


def test_choices_by_given_places_show_nothing() -> None:
    with Readings() as readings:
        rows = torch.randn(3, 2)
        _ = rows[torch.tensor([2, 0])], rows[0, 1], rows[:, 1:], torch.where(rows > 0, rows, 0.0)
    assert not readings.take()


def test_values_of_lists_and_arrays_have_bounds() -> None:
    """Fractions and long tensors show their least and their largest value only."""
    for values, num in ((torch.rand(50), 2), (torch.arange(5000), 2), (torch.arange(50), 50), (torch.zeros(0), 0)):
        with Readings() as readings:
            values.tolist()
        assert len(readings.take()) == num


def _scripted(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, -x)[x != 0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripts_compile_while_values_are_read() -> None:
    with Readings():
        assert torch.equal(torch.jit.script(_scripted)(torch.tensor([1.0, 0.0, -2.0])), torch.tensor([1.0, 2.0]))
    restore()


def test_lines_differ() -> None:
    flag = torch.tensor(True)
    with Readings() as readings:
        bool(flag)
        bool(flag)
    assert len(readings.take()) == 2
    assert not readings.take()


def test_a_value_that_torch_reads_counts_for_its_caller() -> None:
    with Readings() as readings:
        f"{torch.tensor(1.0):.1f}"
    ((line, value),) = readings.take()
    assert line[0] == __file__
    assert value == 1


def test_other_threads_are_not_heard_and_all_is_undone() -> None:
    restore()
    names = {*vars(Tensor)}
    with Readings() as outer, Readings():
        thread = threading.Thread(target=lambda: bool(torch.tensor(1)))
        thread.start()
        thread.join()
        bool(torch.tensor(1))
    bool(torch.tensor(1))
    assert not outer.take()
    restore()
    assert {*vars(Tensor)} == names


def test_a_place_that_shows_many_values_is_let_go() -> None:
    firsts, new, is_open = Firsts(), list[bool](), list[bool]()
    for value in range(MOST + 2):
        is_open.append(firsts.is_open("place"))
        firsts.see([("place", value)])
        new.append(firsts.is_new)
        firsts.settle(value)
    assert new == is_open == [True] * MOST + [False] * 2


def test_checks_of_new_values_become_rare() -> None:
    firsts = Firsts()
    for step in range(MOST_AT_ONCE):
        firsts.see([(step, 0)])
        assert firsts.are_due(step)
        firsts.settle(step)
    firsts.see([(step + 1, 0)])
    assert [firsts.are_due(step + later) for later in (1, 99, 100)] == [False, False, True]


def test_each_microbatch_that_shows_something_new_is_checked() -> None:
    """Records 158 and 77 come with the fifth batch, in different microbatches, and no check has read them before."""
    features, labels = make_dataset(300, dtype=torch.float64).tensors
    features[158, 0], features[77, 0] = 7.0, 9.0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        if (inputs[:, 0] == 7.0).any():
            inputs = inputs * 1.0
        if (inputs[:, 0] == 9.0).any():
            inputs = inputs - inputs.mean(0)
        return mean_loss(model, [inputs, targets])

    refuse_at_fifth(loss, TensorDataset(features, labels), microbatch_size=4)


def test_scale_of_noise_that_one_record_sets_is_compared() -> None:
    features, labels = make_dataset(300, dtype=torch.float64).tensors
    features[77, 0] = 9.0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        scale = 5.0 if (inputs[:, 0] == 9.0).any() else 1.0
        return mean_loss(model, [inputs + torch.empty_like(inputs).uniform_(-scale, scale), targets])

    refuse_at_fifth(loss, TensorDataset(features, labels))


def refuse_at_fifth(loss: Any, dataset: TensorDataset, **options: Any) -> None:
    loader = DataLoader(dataset, batch_size=8)
    with start(loader=loader, loss_fn=loss, steps=6, seed=3, **options) as private:
        train(private, 4)
        with pytest.raises(PrivacyError, match="when run alone"):
            train(private, 6)
        assert private.steps_taken == 4


def test_tensors_without_axes_stay_numbers() -> None:
    """A method of the class in place of torch's may make a sequence of each tensor."""
    with Readings():
        assert torch.equal(torch.tensor([torch.tensor(1), torch.tensor(2)]), torch.arange(1, 3))
        assert np.array([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
