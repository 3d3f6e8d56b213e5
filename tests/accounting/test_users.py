"""The cost of a record-level run for a whole user."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from lightning_dp.accounting import Ledger, PrivacyEvent, gaussian_epsilon, make_accountant, user_epsilon

DELTA = 1e-5


def ledger_of(*runs, relation="add_or_remove_one"):
    return Ledger(relation).extended(runs)


def poisson(sigma, rate):
    return PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=rate)


@pytest.mark.slow  # tests/cli/test_accounting.py has the case of two records
@pytest.mark.parametrize(("records", "expected"), [(1, 0.9127), (4, 4.1482)])
def test_epsilon_of_a_user_meets_the_reference(records, expected):
    found = user_epsilon(ledger_of((poisson(1.0, 0.01), 200)), DELTA, records_per_user=records)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_one_record_per_user_is_the_record_level():
    ledger = ledger_of((poisson(1.0, 0.1), 20), (PrivacyEvent.gaussian(noise_multiplier=8.0), 2))
    found = user_epsilon(ledger, DELTA, records_per_user=1, discretization=2e-3)
    assert found == pytest.approx(make_accountant("pld").epsilon(ledger, DELTA), rel=2e-3)


@pytest.mark.parametrize("records", [2, 5])
@pytest.mark.one_in(2)
def test_one_step_is_a_mixture_over_the_records_that_joined(records):
    """Both directions by numerical integration; the number of records counts, not its square."""
    sigma, rate = 2.0, 0.3
    x = np.linspace(-40, 40 + records, 100_001)
    weights = binom.pmf(np.arange(records + 1), records, rate)
    within = sum(weight * norm.pdf(x, k, sigma) for k, weight in enumerate(weights))
    without = norm.pdf(x, 0, sigma)
    found = user_epsilon(ledger_of((poisson(sigma, rate), 1)), DELTA, records_per_user=records, discretization=1e-2)

    def delta(epsilon):
        return max(
            np.trapezoid(np.maximum(one - math.exp(epsilon) * other, 0), x)
            for one, other in ((within, without), (without, within))
        )

    assert delta(found) <= DELTA <= delta(found * 0.99)


@pytest.mark.parametrize(
    "run",
    [
        (PrivacyEvent.gaussian(noise_multiplier=9.0), 4),
        (PrivacyEvent.shuffle(noise_multiplier=9.0), 40, 4),
        (PrivacyEvent.allocation(noise_multiplier=9.0, num_batches=10), 40, 4),
    ],
    ids=repr,
)
def test_unsampled_records_of_a_user_add_up(run):
    found = user_epsilon(ledger_of(run), DELTA, records_per_user=3, discretization=1e-4)
    assert gaussian_epsilon(2 * 3 / 9, DELTA) == pytest.approx(found, rel=1e-3)


def test_edges_of_a_users_epsilon():
    assert user_epsilon(Ledger(), DELTA, records_per_user=3) == 0
    assert user_epsilon(ledger_of((poisson(0.0, 0.1), 1)), DELTA, records_per_user=3) == math.inf
    added, zeroed = (
        user_epsilon(ledger_of((poisson(4.0, 0.1), 1), relation=name), DELTA, records_per_user=2, discretization=0.01)
        for name in ("add_or_remove_one", "zero_out")
    )
    assert zeroed == added
    with pytest.raises(ValueError, match='for records_per_user, got "replace_one"'):
        user_epsilon(Ledger("replace_one"), DELTA, records_per_user=2)
    with pytest.raises(ValueError, match="integer >= 1, got records_per_user=0"):
        user_epsilon(Ledger(), DELTA, records_per_user=0)
    with pytest.raises(ValueError, match="0 < delta < 1, got delta=0"):
        user_epsilon(Ledger(), 0.0, records_per_user=1)
