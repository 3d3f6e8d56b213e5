"""Rényi divergences of Poisson samples: those of dp-accounting, computed for all orders at once."""

import logging

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from lightning_dp.accounting import Mechanism, RDPAccountant
from lightning_dp.accounting.rdp import divergences_of

ORDERS = RDPAccountant.orders


def of_library(sample_rate, sigma):
    logging.getLogger("absl").setLevel(logging.ERROR)  # a line for each order whose series does not end
    library = RdpAccountant(ORDERS)
    library.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(sigma)))
    return np.maximum(library.rdp, 0)


@pytest.mark.parametrize("sample_rate", [1e-4, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
def test_divergences_are_those_of_dp_accounting(sample_rate, sigma):
    """At whole and other orders; what the library leaves out is left out, too."""
    expected = of_library(sample_rate, sigma)
    whole = ORDERS % 1 == 0
    assert np.isfinite(expected[whole]).all()
    for direction in divergences_of(Mechanism(sample_rate, sigma, 1)):
        assert (np.isfinite(direction) == np.isfinite(expected)).all()
        np.testing.assert_allclose(direction, expected, rtol=1e-9, atol=2e-14)
    wrong = divergences_of(Mechanism(sample_rate, sigma * 1.001, 1))[0]
    assert not np.allclose(wrong, expected, rtol=1e-9, atol=2e-14)


def test_whole_orders_alone_are_the_same():
    whole = divergences_of(Mechanism(0.05, 1.1, 1), whole_orders=True)
    np.testing.assert_allclose(whole, divergences_of(Mechanism(0.05, 1.1, 1))[:, ORDERS % 1 == 0], rtol=1e-12)
