"""Fixed wavelet features of small images: nothing is learned from the data, so they cost no privacy.

A scattering transform of two orders (Bruna & Mallat 2013; with private linear classifiers: Tramer & Boneh 2021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Angles of the wavelets, equally spaced over half a turn.
ORIENTATIONS = 8
#: Features of one 28 x 28 image.
FEATURES = 81 * 49


def morlet(size: int, scale: float, angle: float, slant: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the real and the imaginary part of a Morlet wavelet of zero mean on a ``size x size`` grid.

    exp(-(u^2 + slant^2 v^2) / (2 scale^2)) (exp(3 i pi u / (4 scale)) - kappa), (u, v) rotated by ``angle``, absolute
    sum 1.
    """
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = x * math.cos(angle) + y * math.sin(angle), -x * math.sin(angle) + y * math.cos(angle)
    envelope = torch.exp(-(u**2 + slant**2 * v**2) / (2 * scale**2))
    wave = envelope * torch.exp(1j * (3 * math.pi / 4 / scale) * u)
    wave = wave - envelope * (wave.sum() / envelope.sum())
    wave = wave / wave.abs().sum()
    return wave.real.float(), wave.imag.float()


def _bank(size: int, scale: float) -> Tensor:
    parts = [morlet(size, scale, math.pi * k / ORIENTATIONS) for k in range(ORIENTATIONS)]
    return torch.stack([part for pair in zip(*parts, strict=True) for part in pair])[:, None]


def _modulus(maps: Tensor, bank: Tensor) -> Tensor:
    """Return absolute values of wavelet responses: ``(n, c, h, w)`` to ``(n, c x orientations, h, w)``."""
    n, c, h, w = maps.shape
    out = nn.functional.conv2d(maps.reshape(n * c, 1, h, w), bank, padding=bank.shape[-1] // 2)
    real, imaginary = out.chunk(2, dim=1)
    return torch.hypot(real, imaginary).reshape(n, c * ORIENTATIONS, h, w)


@torch.no_grad()
def waves(images: Tensor) -> Tensor:
    """Return scattering features of images in [0, 1]: wavelet moduli of two scales, their second order, each averaged
    over 4 x 4.

    81 maps of 7 x 7 from 28 x 28: the image, 8 + 8 orientations, and 64 pairs. Groups of three maps are then normalised
    within the image (zero mean, unit variance), so a record's features depend on this record alone: fixed functions of
    one record cost no privacy.

    Args:
        images: of shape ``(n, 1, 28, 28)``.

    Returns:
        Features of shape ``(n, 81 * 49)``.
    """
    fine, coarse = _bank(7, 0.8), _bank(11, 1.6)
    first = _modulus(images, fine)
    second = nn.functional.avg_pool2d(_modulus(first, coarse), 4)
    low = [nn.functional.avg_pool2d(maps, 4) for maps in (images, first, _modulus(images, coarse))]
    maps = torch.cat([*low, second], dim=1)
    return nn.functional.group_norm(maps, 27, eps=1e-5).flatten(1)
