"""The one place where votes leave the teachers: noise everywhere, the ledger first, nothing beyond a budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from lightning_dp.accounting import Ledger, make_accountant
from lightning_dp.datalens import DataLensPlan
from lightning_dp.datalens.release import VoteRelease
from lightning_dp.errors import PrivacyError


def make_plan(**options: Any) -> DataLensPlan:
    defaults: dict[str, Any] = {
        "dataset_size": 100,
        "num_teachers": 10,
        "top_k": 2,
        "batch_size": 100,
        "noise_std": 7.0,
        "threshold": 0.0,
        "steps": None,
        "delta": 1e-5,
    }
    return DataLensPlan(**{**defaults, **options})


def release(sums: torch.Tensor, ledger: Ledger, *, of: VoteRelease | None = None, **options: Any) -> torch.Tensor:
    arguments = {"plan": make_plan(), "step": 0, **options}
    return (of or VoteRelease())(sums, ledger=ledger, accountant=make_accountant("gdp"), **arguments)


def has_std(sample: torch.Tensor, std: float) -> bool:
    """Chi-square test of the variance around a known mean of 0; false-alarm rate 2e-8."""
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=sample.numel())
    return bool(low < float((sample.double() / std).square().sum()) < high)


@pytest.mark.parametrize("secure", [False, True])
def test_coordinates_that_nobody_voted_on_carry_the_same_noise(secure: bool) -> None:
    """100 x 400 coordinates, half of them voted on by all. On the secure grid a 0 has a rate of 4e-7: more than 2 in <
    1e-7 runs.
    """
    votes = torch.zeros(100, 400)
    votes[:, ::2] = 10.0
    noisy = release(votes.clone(), Ledger("replace_one"), of=VoteRelease(secure=secure))
    for part in ((noisy - votes)[:, ::2], noisy[:, 1::2]):
        assert has_std(part, 7.0)
        assert not has_std(part, 7.0 * 2 / 3)
        assert not has_std(part, 7.0 * 3 / 2)
    assert int((noisy[:, 1::2] == 0).sum()) <= (2 if secure else 0)


def test_each_of_w_ranks_adds_its_share_before_the_sum() -> None:
    """Four ranks, played one after the other; their total has the noise once."""
    total = torch.zeros(100, 100)
    for _ in range(4):
        calls: list[torch.Tensor] = []
        own = release(
            torch.zeros(100, 100), Ledger("replace_one"), of=VoteRelease(world_size=4), sum_over_ranks=calls.append
        )
        assert calls[0] is own
        assert has_std(own, 3.5)
        total += own
    assert has_std(total, 7.0)
    assert not has_std(total, 14.0)


def test_the_ledger_is_written_before_the_noise_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, votes = Ledger("replace_one"), torch.ones(100, 4)
    seen: list[int] = []
    releasing = VoteRelease()

    def failing(tensor: torch.Tensor, std: float) -> None:
        seen.append(ledger.num_steps)
        raise KeyError("power cut")

    monkeypatch.setattr(releasing._noise, "add_", failing)
    with pytest.raises(KeyError, match="power cut"):
        release(votes, ledger, of=releasing)
    assert seen == [1]
    (entry,) = ledger.entries
    assert entry.event.kind == "gaussian"
    assert entry.event.noise_multiplier == pytest.approx(7.0 / (2 * math.sqrt(2 * 100)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5, "last_allowed_step": 5}, "stop after 5 steps"),
        ({"plan": make_plan(target_epsilon=1.0, noise_std=1.0)}, "epsilon <= 1 after this step"),
        ({"plan": make_plan(target_epsilon=1.0, noise_std=0.0)}, "epsilon=inf"),
    ],
)
def test_a_forbidden_release_leaves_votes_and_ledger_as_they_are(options: dict[str, Any], message: str) -> None:
    ledger, votes = Ledger("replace_one"), torch.ones(100, 4)
    with pytest.raises(PrivacyError, match=message):
        release(votes, ledger, **options)
    assert ledger.num_steps == 0
    assert bool((votes == 1).all())


def test_the_target_is_previewed_over_the_whole_history() -> None:
    """As many releases as fit, and not one more."""
    plan, ledger = make_plan(target_epsilon=3.0, noise_std=100.0), Ledger("replace_one")

    def release_many() -> None:
        for step in range(1000):
            release(torch.zeros(100, 2), ledger, plan=plan, step=step)

    with pytest.raises(PrivacyError, match="epsilon <= 3"):
        release_many()
    accountant = make_accountant("gdp")
    assert ledger.num_steps > 3
    assert accountant.epsilon(ledger, 1e-5) <= 3.0 < accountant.epsilon(ledger.extended(plan.runs(0, 1)), 1e-5)


def test_another_number_of_samples_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="exactly this many"):
        release(torch.zeros(101, 4), Ledger("replace_one"))
