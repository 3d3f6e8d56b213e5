"""Public masks of the gradient's coordinates, the same for all samples and on all ranks."""

from lightning_dp.masks.magnitude import MagnitudeMask, magnitude_masks, prunable_names, public_weights
from lightning_dp.masks.mask import GradientMask, random_subset
from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.masks.random import RandomMask

__all__ = [
    "GradientMask",
    "MagnitudeMask",
    "ParameterMask",
    "RandomMask",
    "magnitude_masks",
    "prunable_names",
    "public_weights",
    "random_subset",
]
