"""Contributions of a microbatch's samples to the sum, as factors or as explicit vectors.

Shapes: G groups of parameters, B samples, P private coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Samples(Protocol):
    """The per-sample gradients of a microbatch; norms and gradients are computed when they are first read."""

    @property
    def norms(self) -> Tensor:
        """L2 norms per group and sample, shape (G, B), float32 or float64. Private."""

    @property
    def gradients(self) -> Tensor:
        """Whole per-sample gradients, shape (B, P). Private."""

    @property
    def active(self) -> Tensor | None:
        """Active coordinates as booleans of shape (P,), public; None if all are active."""

    def add_weighted(self, factors_GB: Tensor) -> None:
        """Add the sum of ``factor * gradient`` over the samples to the accumulator."""

    def add_sum(self, total_P: Tensor) -> None:
        """Add an explicit sum to the accumulator."""


class Contribution(ABC):
    """The contribution of each sample of a microbatch to the sum.

    **Guarantee**: no sample's contribution is longer than the sensitivity of the clipping. Contributions are private.
    """

    @property
    @abstractmethod
    def norms(self) -> Tensor:
        """L2 norm of each sample's contribution over all groups, shape (B,)."""

    @abstractmethod
    def add(self) -> None:
        """Add the contributions of all samples to the accumulator."""


@dataclass(frozen=True)
class WeightedContribution(Contribution):
    """Contributions equal to each sample's gradient times one factor per group.

    Args:
        samples: gradients of a microbatch.
        factors: (G, B), >= 0.
    """

    samples: Samples
    factors: Tensor

    @property
    def norms(self) -> Tensor:
        """L2 norm of each sample's contribution over all groups, shape (B,)."""
        norms: Tensor = torch.linalg.vector_norm(self.factors * self.samples.norms, dim=0)
        return norms

    def add(self) -> None:
        """Add the weighted sum to the accumulator, without materialized per-sample gradients if possible."""
        self.samples.add_weighted(self.factors)


@dataclass(frozen=True)
class ExplicitContribution(Contribution):
    """Contributions given as one vector per sample, not as a multiple of the sample's gradient.

    Args:
        samples: gradients of a microbatch.
        values: (B, P).
    """

    samples: Samples
    values: Tensor

    @property
    def norms(self) -> Tensor:
        """L2 norm of each sample's contribution, shape (B,)."""
        norms: Tensor = torch.linalg.vector_norm(self.values, dim=1)
        return norms

    def add(self) -> None:
        """Add the sum of the vectors to the accumulator."""
        self.samples.add_sum(self.values.sum(0))
