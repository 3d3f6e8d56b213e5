"""Un-noised figures about clipping and noise, for study and only on request: they are not private."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FIGURES = ("clip_fraction", "clipping_bias", "noise_to_signal")


class Diagnostics:
    """What clipping and noise did to one logical batch.

        clip_fraction   = share of samples whose contribution is shorter than their gradient
        clipping_bias   = cos(sum of clipped gradients, sum of raw gradients)
        noise_to_signal = noise_std sqrt(d) / ||sum of clipped gradients||

    **Guarantee**: none. The figures are functions of the batch without noise; whoever logs them publishes them.

    Example:
        >>> diagnostics = Diagnostics()
        >>> diagnostics.add(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0]))
        >>> figures = diagnostics.summarise(torch.tensor([0.6, 0.8]), noise_std=1.0)
        >>> round(figures["clip_fraction"], 3), round(figures["clipping_bias"], 3), round(figures["noise_to_signal"], 3)
        (0.5, 1.0, 1.414)
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the batch; the last figures stay."""
        self._raw: Tensor | None = None
        self._clipped = self._samples = 0

    def add(self, raw_sum: Tensor, norms_B: Tensor, kept_norms_B: Tensor) -> None:
        """Add a microbatch.

        Args:
            raw_sum: ``(d,)`` sum of its raw gradients.
            norms_B: norms of its raw gradients.
            kept_norms_B: norms of their contributions.
        """
        self._raw = raw_sum.clone() if self._raw is None else self._raw + raw_sum
        self._clipped += int((~(kept_norms_B >= norms_B * (1 - 1e-4))).sum())
        self._samples += norms_B.numel()

    def summarise(self, clipped_sum: Tensor, noise_std: float) -> dict[str, float]:
        """Return the figures of the logical batch, by name; an empty batch has none."""
        if self._raw is None:
            return {}
        length = float(torch.linalg.vector_norm(clipped_sum))
        product = float(torch.linalg.vector_norm(self._raw)) * length
        self.figures = {
            "clip_fraction": self._clipped / max(self._samples, 1),
            "clipping_bias": float(clipped_sum @ self._raw) / product if product > 0 else math.nan,
            "noise_to_signal": noise_std * math.sqrt(clipped_sum.numel()) / length if length > 0 else math.inf,
        }
        return self.figures
