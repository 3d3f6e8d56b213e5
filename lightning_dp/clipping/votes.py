"""Votes: +1 or -1 on k coordinates in place of a gradient, and the direction of a noisy sum of votes.

Shape suffixes: ``D`` coordinates of one gradient, ``K`` coordinates voted on.
"""

from __future__ import annotations

import os
import secrets

import numpy as np
import torch
from torch import Tensor

from lightning_dp import _validate as check

SIGNS = ("sign", "stochastic")
_FEW = 8  # up to this k, torch's selection is faster

_coins: dict[tuple[int, torch.device], torch.Generator] = {}


@torch.no_grad()
def top_k_votes(
    gradients: Tensor, top_k: int, *, signs: str = "sign", generator: torch.Generator | None = None
) -> Tensor:
    """Return +1 or -1 on the k largest coordinates of each gradient, and 0 elsewhere.

        v[j] = sign(g[j]) for the k largest |g[j]|, 0 elsewhere
        signs="stochastic": v[j] = +1 with probability 1/2 + g[j] / (2 b), else -1, with b = max |g|

    **Guarantee**: ``||v|| <= sqrt(k)`` for every input, zero, huge, infinite and NaN ones included; equality for a
    finite gradient with at least k coordinates that are not zero. A gradient that is not finite, or zero, casts no
    vote. The votes are NOT private, because their coordinates and signs come from the data.

    Args:
        gradients: shape (..., D), any floating type; each row is voted on alone.
        top_k: k, from 1 to D.
        signs: "sign" or "stochastic".
        generator: generator of the coins of "stochastic"; ``None``: torch's on the CPU. The coins need not be secret.

    Returns:
        Votes in {-1, 0, +1}, shape (..., D), float32, or float64 for gradients of that type. Not private.

    Raises:
        ValueError: k beyond D, or an unknown rule for the signs.

    Example:
        >>> top_k_votes(torch.tensor([0.1, -3.0, 2.0]), 2)
        tensor([ 0., -1.,  1.])

    References:
        Wang et al. 2021, DataLens, Algorithms 2 and 3.
    """
    check.check_choice("signs", signs, SIGNS)
    if signs == "sign" and top_k == gradients.shape[-1]:  # all coordinates: nothing to select
        grads = _at_least_float32(gradients)
        return torch.where(grads.isfinite().all(-1, keepdim=True), grads.sign(), 0.0)
    values_K, chosen = largest_coordinates(gradients, top_k)
    if signs == "sign":
        votes_K = values_K.sign()
    else:
        largest = values_K.abs().amax(-1, keepdim=True)
        device = "cpu" if generator is None else generator.device
        coins = torch.rand(values_K.shape, generator=generator, dtype=values_K.dtype, device=device).to(values_K.device)
        up = coins < 0.5 + 0.5 * (values_K / largest)
        votes_K = torch.where(up, 1.0, -1.0) * (largest > 0)
    return torch.zeros_like(gradients, dtype=values_K.dtype).scatter_(-1, chosen, votes_K.to(values_K.dtype))


def largest_coordinates(gradients: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the k entries of largest magnitude in each row and their indices; entries are 0 in a non-finite row.

    Args:
        gradients: shape (..., D), any floating type.
        top_k: k, from 1 to D.

    Returns:
        Signed values, float32 or float64, and distinct indices, both of shape (..., K). Both are private.

    Raises:
        ValueError: k beyond D.
    """
    check.check_count("top_k", top_k)
    dimension = gradients.shape[-1]
    if top_k > dimension:
        raise ValueError(
            f"Expected top_k <= {dimension}, the coordinates of one sample, got top_k={top_k}. Lower top_k; more votes "
            "also need more noise."
        )
    grads = _at_least_float32(gradients)
    chosen = _places_of_largest(grads.abs(), top_k)
    values_K = grads.gather(-1, chosen)
    finite = values_K.isfinite().all(-1, keepdim=True)  # NaN and inf rank among the largest
    return torch.where(finite, values_K, 0.0), chosen


def _at_least_float32(gradients: Tensor) -> Tensor:
    return gradients if gradients.dtype == torch.float64 else gradients.float()


def _places_of_largest(magnitudes: Tensor, top_k: int) -> Tensor:
    """Return the unordered indices of the k largest entries per row; on a CPU, numpy is faster unless k is small."""
    if magnitudes.device.type != "cpu" or top_k <= _FEW:
        return magnitudes.topk(top_k, dim=-1, sorted=False).indices
    first = magnitudes.shape[-1] - top_k
    return torch.from_numpy(np.argpartition(magnitudes.numpy(), first, axis=-1)[..., first:])


def threshold_votes(noisy_sums: Tensor, threshold: float) -> Tensor:
    """Return the sign of each noisy sum of votes whose magnitude exceeds a threshold, else 0.

        u[j] = sign(s[j]) where |s[j]| > threshold, else 0

    **Guarantee**: the result is post-processing, as private as ``noisy_sums``.

    Args:
        noisy_sums: sums of votes after noise, any shape.
        threshold: >= 0, in votes: the fraction beta times the number of voters.

    Returns:
        Directions in {-1, 0, +1}, of the same shape.

    Example:
        >>> threshold_votes(torch.tensor([5.0, -9.0, 2.0]), 4.0)
        tensor([ 1., -1.,  0.])
    """
    check.check_nonnegative("threshold", threshold)
    return torch.where(noisy_sums.abs() > threshold, noisy_sums.sign(), torch.zeros_like(noisy_sums))


def coin_generator(device: torch.device) -> torch.Generator:
    """Return this process's generator of coins on a device, seeded by the operating system at its first use.

    **Guarantee**: independent of torch's own generators, which it neither reads nor advances, and of the generator of a
    parent or child process. No privacy rests on it, because any coins keep ``||v|| <= sqrt(k)``.

    Args:
        device: device of the coins.
    """
    key = (os.getpid(), device)
    if key not in _coins:
        _coins[key] = torch.Generator(device=device)
        _coins[key].manual_seed(secrets.randbits(63))
    return _coins[key]
