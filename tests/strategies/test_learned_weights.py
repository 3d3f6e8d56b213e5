"""Learned weights of losses meet the losses of records."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.strategies.test_ways import Weighted, apart, data, fit, weights

JOINED: dict[str, Any] = {
    "each by itself": apart,
    "stacked": lambda m, a, b: (torch.exp(-m.s) * torch.stack([a, b]) + m.s).sum() + 0.0 * m.one.sum(),
    "by a weight of shape (1,)": lambda m, a, b: torch.exp(-m.one) * a + m.one + b + 0.0 * m.s.sum(),
}


@pytest.mark.parametrize("name", JOINED)
@pytest.mark.one_in(4)
def test_learned_weights_of_losses_meet_those_of_records(name: str, caplog: Any) -> None:
    assert_trains_by_rules(lambda: Weighted(JOINED[name]), caplog)


def penalised(m: Any, a: Tensor, b: Tensor) -> Tensor:
    total: Tensor = 0.1 * sum(p.square().sum() for p in m.parameters()) + a
    return total + b


USERS = [0, 1, 2, 0, 3, 1, 3, 2, 4, 4, 5, 5]


@pytest.mark.parametrize("options", [{}, {"unit": USERS, "records_per_unit": 2}], ids=["records", "users"])
@pytest.mark.one_in(2)
def test_a_penalty_beside_a_mean_counts_for_all_alike(options: dict[str, Any], caplog: Any) -> None:
    assert_trains_by_rules(lambda: Weighted(penalised, lambda loss, step: loss.sum() / len(loss)), caplog, **options)


def assert_trains_by_rules(make: Any, caplog: Any, **more: Any) -> None:
    """Weights that are trained by rules are those of samples that run one at a time."""
    caplog.set_level(logging.INFO)
    together, alone = make().double(), make().double()
    options = {"precision": "64-true", "dataset": data(torch.float64), "max_grad_norm": 0.3, **more}
    fit(together, **options)
    assert not [r for r in caplog.records if "Samples run one at a time" in r.message]
    fit(alone, grad_sample="single", **options)
    torch.testing.assert_close(weights(together), weights(alone), rtol=1e-9, atol=1e-9)


def test_losses_of_records_need_checks(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    fit(Weighted(apart), check_per_sample=False)
    assert [r for r in caplog.records if "Samples run one at a time" in r.message]
