"""Gaussian noise: who draws it, from which generator, and how early."""

from lightning_dp.noise.gaussian import GaussianNoise
from lightning_dp.noise.prefetch import has_spare_core

__all__ = ["GaussianNoise", "has_spare_core"]
