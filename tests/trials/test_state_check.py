"""State left by a step: the state that a checkpoint holds does not depend on the records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.saved_state import ROUNDING, changed, changes_in, saved_state
from lightning_dp.trials.state_check import check_state

RECORDS = ["a", "b", "c"]


def test_saved_state_is_what_a_checkpoint_holds() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    state = saved_state(module, [optimizer, scheduler])
    assert set(module.state_dict()) <= set(state)
    assert "scratch" not in state
    assert state["optimizer 0, param_groups[0]['lr']"] == 0.5
    assert state["StepLR.step_size"] == 3
    before = state["0.weight"].clone()
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(state["0.weight"], before)


def test_changed_names_what_differs_by_more_than_rounding() -> None:
    one: dict[str, Any] = {"x": torch.ones(2), "near": torch.ones(2), "n": 1, "nan": torch.tensor(torch.nan)}
    two = {
        "x": torch.zeros(2),
        "near": torch.ones(2) * (1 + ROUNDING / 2),
        "n": 2,
        "nan": torch.tensor(torch.nan),
        "new": 1,
    }
    assert list(changed(one, two)) == ["x", "n", "new"]
    assert list(changed(one, one)) == []


def runner(state_of: Any, gradient_of: Any) -> Any:
    """A run whose state after the first batch, and whose gradient of the last, follow from the batches."""

    def run(batches: list[list[str]]) -> Any:
        gradient = {"weight": torch.tensor([float(gradient_of(batches))])}
        return [({"memory": state_of(batches[0])}, {}), *[({}, gradient)] * (len(batches) - 1)]

    return run


def test_state_that_follows_records_or_their_number_is_refused() -> None:
    check_state(runner(lambda batch: 1, lambda batches: 2.0), RECORDS, together=True)
    with pytest.raises(PrivacyError, match="leaves 'memory' with another value after another record"):
        check_state(runner(lambda batch: batch[0], lambda batches: 2.0), RECORDS, together=True)
    counting = runner(len, lambda batches: 2.0)
    with pytest.raises(PrivacyError, match="leaves 'memory' with another value after 2 records instead of 1"):
        check_state(counting, RECORDS, together=True)
    check_state(counting, RECORDS, together=False)  # no step sees two records


def test_later_gradient_that_follows_earlier_records_is_refused() -> None:
    remembers = runner(lambda batch: 1, lambda batches: 2.0 + (batches[0] == ["b"]))
    with pytest.raises(PrivacyError, match="The gradient of a record changes with what training_step saw before"):
        check_state(remembers, RECORDS, together=True)
    rounds = runner(lambda batch: 1, lambda batches: 2.0 + ROUNDING * (batches[0] == ["b"]))
    check_state(rounds, RECORDS, together=True)
    breaks = runner(lambda batch: 1, lambda batches: torch.nan if batches[0] == ["b"] else 2.0)
    with pytest.raises(PrivacyError, match="differs after another record"):
        check_state(breaks, RECORDS, together=True)


def test_state_that_only_some_records_change_is_refused() -> None:
    three = [torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)]

    def state_of(batch: list[torch.Tensor]) -> Any:
        if float(batch[0].max()) < 0:
            raise ValueError("negative")
        return float(batch[0].max()) > limit

    limit = 1e9
    check_state(runner(state_of, lambda batches: 2.0), three, together=True)  # the user's code refuses negative records
    limit = 100.0
    with pytest.raises(PrivacyError, match="leaves 'memory' with another value after a record of extreme values"):
        check_state(runner(state_of, lambda batches: 2.0), three, together=True)
    rare = runner(lambda batch: "z" in batch, lambda batches: 2.0)
    check_state(rare, RECORDS, together=True, real=[["a", "b"]])
    with pytest.raises(PrivacyError, match="leaves 'memory' with another value after the records of a batch"):
        check_state(rare, RECORDS, together=True, real=[["a", "b"], ["b", "z"]])


def test_writes_of_the_same_value_are_counted() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = changes_in(module, [])
    with torch.no_grad():
        module[1].running_mean.zero_()
        module[1].weight = nn.Parameter(torch.ones(2))
    state = saved_state(module, [], before)
    counts = {name.removeprefix("number of writes to "): each for name, each in state.items() if "number of" in name}
    assert {name: each for name, each in counts.items() if each} == {"1.running_mean": 1, "1.weight": -1}
