"""Gaussian noise: independent and correlated, on one thread or several."""

from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.noise.gaussian import GaussianNoise
from lightning_dp.noise.redrawn import CorrelatedGaussianNoise

__all__ = ["CorrelatedGaussianNoise", "CorrelatedNoise", "GaussianNoise"]
