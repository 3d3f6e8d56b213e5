"""Gaussian noise: independent and correlated, on several threads, and drawn ahead of time."""

from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.noise.gaussian import GaussianNoise
from lightning_dp.noise.prefetch import has_spare_core
from lightning_dp.noise.redrawn import CorrelatedGaussianNoise

__all__ = ["CorrelatedGaussianNoise", "CorrelatedNoise", "GaussianNoise", "has_spare_core"]
