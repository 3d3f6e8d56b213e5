"""Passes under random allocation in ledgers, calibration and the accountants other than "pld"."""

import math

import numpy as np
import pytest

from lightning_dp.accounting import (
    ACCOUNTANTS,
    Ledger,
    Mechanism,
    PLDAccountant,
    PrivacyEvent,
    RDPAccountant,
    calibrate_noise_multiplier,
    first_steps,
    make_accountant,
    max_steps_within,
)
from lightning_dp.accounting.allocation import allocation_law
from lightning_dp.accounting.rdp import divergences_of
from tests.accounting.allocation_reference import DELTA, allocation, epsilon_of, passes_of


def test_query_by_query_agrees_with_a_new_accountant():
    accountant, ledger = PLDAccountant(), Ledger()
    for number in range(12):
        ledger.start_pass()
        ledger.record(allocation(1.0 + 0.1 * (number // 4), 20), 20)
        epsilon = accountant.epsilon(ledger, DELTA)
        assert epsilon == pytest.approx(PLDAccountant().epsilon(ledger, DELTA), rel=1e-9)


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0])
@pytest.mark.parametrize(("num_batches", "passes"), [(10, 1), (100, 20)])
@pytest.mark.parametrize("name", ["pld", "rdp"])
@pytest.mark.one_in(4)
def test_calibration_is_close_below_the_target(target, num_batches, passes, name):
    def runs(sigma):
        return [passes_of(sigma, num_batches, passes)]

    sigma = calibrate_noise_multiplier(
        target_epsilon=target, delta=DELTA, accountant=make_accountant(name), runs=runs, history=Ledger()
    )
    assert 0.99 * target <= epsilon_of(*runs(sigma), name=name) <= target
    assert epsilon_of(*runs(sigma * 0.98), name=name) > target


@pytest.mark.slow
def test_calibration_of_a_schedule_of_passes():
    def runs(sigma):
        return [passes_of(sigma * 0.9**number, 50) for number in range(6)]

    history = Ledger().extended([passes_of(1.0, 50)])
    sigma = calibrate_noise_multiplier(
        target_epsilon=3.0, delta=DELTA, accountant=PLDAccountant(), runs=runs, history=history
    )
    assert 2.97 <= PLDAccountant().epsilon(history.extended(runs(sigma)), DELTA) <= 3.0


def test_max_steps_stop_at_the_end_of_a_pass():
    four = epsilon_of(passes_of(1.0, 10, 4))
    found = max_steps_within(
        epsilon=four, delta=DELTA, accountant=PLDAccountant(), history=Ledger(), runs=[passes_of(1.0, 10, 9)]
    )
    assert found == 40
    assert first_steps([passes_of(1.0, 10, 9)], 41) == [(allocation(1.0, 10), 41, 5)]


@pytest.mark.parametrize("name", [name for name in ACCOUNTANTS if name not in ("pld", "rdp")])
def test_other_accountants_count_a_pass_as_one_gaussian(name):
    gaussians = (PrivacyEvent.gaussian(noise_multiplier=3.0), 4)
    assert epsilon_of(passes_of(3.0, 20, 4), name=name) == epsilon_of(gaussians, name=name)
    ledger = Ledger().extended([passes_of(3.0, 20, 4)])
    assert make_accountant(name).epsilon_or_inf(ledger, DELTA) == epsilon_of(gaussians, name=name)


def test_rdp_gives_the_published_bound_which_is_loose():
    assert epsilon_of(passes_of(1.0, 100), name="rdp") == pytest.approx(1.166, abs=5e-4)
    for case in [(1.0, 2, 1), (0.5, 10, 3), (3.0, 1000, 5), (50.0, 100, 200), (0.3, 10_000, 1)]:
        assert epsilon_of(passes_of(*case), name="rdp") > epsilon_of(passes_of(*case))
        gaussian = (PrivacyEvent.gaussian(noise_multiplier=case[0]), case[2])
        assert epsilon_of(passes_of(*case), name="rdp") <= epsilon_of(gaussian, name="rdp") * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sigma", "num_batches"), [(1.0, 2), (2.0, 5), (1.0, 100), pytest.param(8.0, 1_000, marks=pytest.mark.slow)]
)
@pytest.mark.one_in(3)
def test_rdp_bounds_the_divergences_of_a_pass(sigma, num_batches):
    """Exact at integers, from above between them, and from above for "add"; low orders, which the law's grid covers."""
    law = allocation_law(sigma, num_batches, 256)
    bounds = divergences_of(Mechanism(1 / num_batches, sigma, num_batches))
    for order in (1.5, 2.0, 2.5, 3.0, 4.0):
        remove, add = bounds[:, int(np.flatnonzero(np.isclose(RDPAccountant.orders, order))[0])]
        truth = math.log(law.masses @ np.exp(order * law.log_points)) / (order - 1)
        assert truth * (1 - 1e-3) <= remove <= truth * (1.001 if order == int(order) else 1.5)
        assert add >= math.log(law.masses @ np.exp((1 - order) * law.log_points)) / (order - 1) * (1 - 1e-3)
        second = math.log1p(math.expm1(1 / sigma**2) / num_batches)
        assert order != 2.0 or remove == pytest.approx(second, rel=1e-9)


def test_tiny_delta_is_bounded_by_renyi_divergences():
    run = passes_of(1.0, 10, 2)
    assert epsilon_of(run, delta=1e-30) == epsilon_of(run, name="rdp", delta=1e-30) < math.inf


def test_relations_that_exchange_a_record_are_not_amplified():
    with pytest.raises(
        ValueError, match=r'kind="allocation", got neighboring_relation="replace_one"\. Record kind="shuffle"'
    ):
        Ledger("replace_one").record(allocation(1.0, 10))
    with pytest.raises(ValueError, match='got neighboring_relation="replace_one"'):
        Ledger("replace_one").extended([passes_of(1.0, 10, 3)])
