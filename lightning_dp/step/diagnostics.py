"""Un-noised figures about clipping and noise, for study and only on request, because they are not private."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override


class Diagnostics:
    """Figures about each logical batch. This base class has none and means "off"."""

    reads_sums: ClassVar[bool] = False
    """True if this object reads un-noised sums, so that no sum may begin with its noise."""

    def add(self, raw_sum: Tensor, norms_B: Tensor, kept_norms_B: Tensor) -> None:
        """Add the figures of one microbatch; do nothing when off.

        Args:
            raw_sum: ``(d,)`` sum of its raw gradients.
            norms_B: norms of its raw gradients.
            kept_norms_B: norms of their contributions.
        """

    def summarise(self, clipped_sum: Tensor, noise_std: float) -> None:
        """Compute the figures at the end of a logical batch; do nothing when off.

        Args:
            clipped_sum: ``(d,)`` active coordinates, before noise.
            noise_std: standard deviation of the noise on each coordinate, over all ranks.
        """


class ClippingDiagnostics(Diagnostics):
    """Effects of clipping and noise on one logical batch.

        clip_fraction   = share of samples whose contribution is shorter than their gradient
        clipping_bias   = cos(sum of clipped gradients, sum of raw gradients)
        noise_to_signal = noise_std sqrt(d) / ||sum of clipped gradients||

    **Guarantee**: none. The figures are functions of the batch without noise; whoever logs them publishes them.

    Example:
        >>> diagnostics = ClippingDiagnostics()
        >>> diagnostics.add(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0]))
        >>> diagnostics.summarise(torch.tensor([0.6, 0.8]), noise_std=1.0)
        >>> {name: round(figure, 3) for name, figure in diagnostics.take().items()}
        {'clip_fraction': 0.5, 'clipping_bias': 1.0, 'noise_to_signal': 1.414}
    """

    reads_sums = True

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}
        self._forget()

    def _forget(self) -> None:
        self._raw: Tensor | None = None
        self._clipped = self._samples = 0

    @override
    def add(self, raw_sum: Tensor, norms_B: Tensor, kept_norms_B: Tensor) -> None:
        self._raw = raw_sum.clone() if self._raw is None else self._raw + raw_sum
        self._clipped += int((~(kept_norms_B >= norms_B * (1 - 1e-4))).sum())
        self._samples += norms_B.numel()

    @override
    def summarise(self, clipped_sum: Tensor, noise_std: float) -> None:
        """Compute the figures of the logical batch and reset; an empty batch has none."""
        if self._raw is None:
            return
        length = float(torch.linalg.vector_norm(clipped_sum))
        product = float(torch.linalg.vector_norm(self._raw)) * length
        self._figures = {
            "clip_fraction": self._clipped / max(self._samples, 1),
            "clipping_bias": float(clipped_sum @ self._raw) / product if product > 0 else math.nan,
            "noise_to_signal": noise_std * math.sqrt(clipped_sum.numel()) / length if length > 0 else math.inf,
        }
        self._forget()

    def take(self) -> dict[str, float]:
        """Return, once, the figures of the last non-empty logical batch, by name. NOT private."""
        figures, self._figures = self._figures, {}
        return figures
