"""Clipping bounds: fixed, by a public schedule, or learned from noisy releases.

Legend: ``C_t`` bound of logical step t, ``C_0`` the bound the user gave, ``B`` expected batch size, ``d`` active
coordinates, ``z`` total noise multiplier of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp import schedules
from lightning_dp.clipping import AutomaticClipping, Clipping
from lightning_dp.run_length import RunLength
from lightning_dp.schedules import Schedule


@dataclass(frozen=True)
class NoisyRelease:
    """The released values of a step, which are public.

    Args:
        squared_norm: ``||G~||^2`` of the noisy sum over active coordinates.
        num_live: ``d``, the number of active coordinates.
        noise_std: std of the noise on each active coordinate.
        expected_batch_size: ``B``.
        statistics: noisy sums of the values of :meth:`Bound.statistics`.
    """

    squared_norm: float
    num_live: int
    noise_std: float
    expected_batch_size: int
    statistics: tuple[float, ...]


class Bound:
    """The clipping bound of a run. This base class never changes and means "off".

        C_t = C_0

    **Guarantee**: the bound of a step is a function of public settings and of EARLIER noisy releases only. If a rule
    needs a private statistic, it is part of the same release, and the noise is divided so that gradient and statistic
    together cost the same as the gradient alone: ``z_gradient^-2 + z_statistic^-2 = z^-2``.
    """

    is_fixed: ClassVar[bool] = True
    """True if every step uses the bound that the user gave."""
    num_statistics: ClassVar[int] = 0
    learns: ClassVar[bool] = False
    """True if the bound follows releases, which is refused with several private optimizers."""
    unsound: ClassVar[str] = ""
    """Reason why a run with this rule has no finite epsilon; empty if it has one."""

    @property
    def sees_releases(self) -> bool:
        """True if every release is shown to ``observe``."""
        return self.learns or self.num_statistics > 0

    @property
    def figures(self) -> dict[str, float]:
        """Public values for the loggers, by name."""
        return {}

    def begin_run(self, length: RunLength) -> None:
        """Set everything that depends on the run length; called whenever the plan is made."""

    def clipping(self, base: Clipping, step: int, num_groups: int) -> Clipping:
        """Return the clipping of a logical step; called once, before its first sample."""
        return base

    def statistics(self, norms_B: Tensor) -> Tensor:
        """Return the statistics of a microbatch, shape ``(num_statistics,)``. Private.

        Args:
            norms_B: norms of whole per-sample gradients; may be non-finite.
        """
        return norms_B.new_zeros(0)

    def share_noise(self, noise_multiplier: float, expected_batch_size: int) -> tuple[float, float]:
        """Return the noise multiplier of the gradient and the noise std of each statistic under add_or_remove_one."""
        return noise_multiplier, 0.0

    def rescale(self, statistics: tuple[float, ...]) -> float:
        """Return the factor on the finished gradient: 1, except for rules that are for study only."""
        return 1.0

    def observe(self, release: NoisyRelease) -> None:
        """Update the rule from a noisy release, which is post-processing."""

    def reset(self) -> None:
        """Forget the releases of other runs, which are not in this run's ledger."""

    def state_dict(self) -> dict[str, Any]:
        """Return the public state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""


class ScheduledBound(Bound):
    """A bound that follows a public schedule.

        C_t = schedule(t) C_0

    Args:
        schedule: run length -> logical step -> factor, finite and > 0.
    """

    is_fixed = False

    def __init__(self, schedule: Callable[[RunLength], Schedule]) -> None:
        self._schedule_of = schedule
        self.schedule: Schedule = schedules.constant()

    @override
    def begin_run(self, length: RunLength) -> None:
        self.schedule = self._schedule_of(length)

    @override
    def clipping(self, base: Clipping, step: int, num_groups: int) -> Clipping:
        return base.scaled(check.check_positive("factor", self.schedule(step)))


class _LearnedBound(Bound):
    """A bound that is stored as an absolute number between two limits.

    Args:
        minimum: smallest bound; default ``C_0 / 10``.
        maximum: largest bound; default ``10 C_0``.
    """

    is_fixed = False
    learns = True

    def __init__(self, minimum: float | None = None, maximum: float | None = None) -> None:
        for name, limit in (("minimum", minimum), ("maximum", maximum)):
            if limit is not None:
                check.check_positive(name, limit)
        if minimum is not None and maximum is not None and not minimum <= maximum:
            raise ValueError(
                f"Expected minimum <= maximum, got minimum={minimum} and maximum={maximum}. Exchange them."
            )
        self.minimum, self.maximum = minimum, maximum
        self.value: float | None = None
        self._limits = (0.0, math.inf)

    @property
    @override
    def figures(self) -> dict[str, float]:
        return {} if self.value is None else {"privacy/max_grad_norm": self.value}

    @override
    def clipping(self, base: Clipping, step: int, num_groups: int) -> Clipping:
        start = base.sensitivity(num_groups)
        low = start / 10 if self.minimum is None else self.minimum
        high = start * 10 if self.maximum is None else self.maximum
        self._limits = (low, max(low, high))
        if self.value is None:
            self._move(start)
        assert self.value is not None
        return base.scaled(self.value / start)

    def _move(self, value: float) -> None:
        self.value = min(max(value, self._limits[0]), self._limits[1])

    @override
    def reset(self) -> None:
        self.value = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        value = state["value"]
        self.value = None if value is None else check.check_positive("value", value)


class NoisyGradientBound(_LearnedBound):
    """A bound that follows the denoised norm of the previous noisy gradient, at no privacy cost.

        C_{t+1} = clip(W sqrt(max(||g~_t||^2 - d std_t^2 / B^2, 0)), C_min, C_max),   g~_t = G~_t / B

    **Guarantee**: post-processing of noisy releases, which costs nothing and changes no event.

    Args:
        weight: W > 0. The norm of a mean of clipped gradients is below their bound, so W <= 1 can only shrink it.
        minimum: C_min.
        maximum: C_max.
    """

    def __init__(self, weight: float, minimum: float | None = None, maximum: float | None = None) -> None:
        super().__init__(minimum, maximum)
        self.weight = check.check_positive("weight", weight)

    @override
    def observe(self, release: NoisyRelease) -> None:
        signal = release.squared_norm - release.num_live * release.noise_std**2
        self._move(self.weight * math.sqrt(max(signal, 0.0)) / release.expected_batch_size)


class QuantileBound(_LearnedBound):
    """A bound that follows a quantile of the gradient norms, estimated from a noisy count.

        b~ = (1/B) (sum_i (1[||g_i|| <= C] - 1/2) + N(0, s_b^2)) + 1/2,     C <- C exp(-rate (b~ - quantile))
        z_gradient = (z^-2 - (2 s_b)^-2)^(-1/2)

    **Guarantee**: one sample moves the centred count by 1/2, so the count alone has noise multiplier 2 s_b. Gradient
    and count together have multiplier z, so the event of the step is unchanged and includes the count.

    Args:
        quantile: target share of norms below the bound, in (0, 1).
        rate: step size on log C, > 0.
        count_noise: s_b; default max(B / 20, z); must exceed z / 2, or no privacy is left for the gradient.
        minimum: smallest bound.
        maximum: largest bound.
    """

    num_statistics = 1

    def __init__(
        self,
        quantile: float = 0.5,
        rate: float = 0.2,
        count_noise: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        super().__init__(minimum, maximum)
        self.quantile = check.check_probability("quantile", quantile)
        self.rate = check.check_positive("rate", rate)
        self.count_noise = None if count_noise is None else check.check_positive("count_noise", count_noise)

    @override
    def statistics(self, norms_B: Tensor) -> Tensor:
        assert self.value is not None
        below = (norms_B <= self.value).to(norms_B.dtype)  # NaN does not count as below
        return (below - 0.5).sum().reshape(1)

    @override
    def share_noise(self, noise_multiplier: float, expected_batch_size: int) -> tuple[float, float]:
        std = max(expected_batch_size / 20, noise_multiplier) if self.count_noise is None else self.count_noise
        if noise_multiplier == 0:
            return 0.0, std
        if not 2 * std > noise_multiplier:
            raise ValueError(
                f"Expected 2 x count_noise > the noise multiplier {noise_multiplier:.4g}, got count_noise={std:.4g}. "
                "The count alone would cost more than the whole step: raise count_noise, or leave it out."
            )
        return (noise_multiplier**-2 - (2 * std) ** -2) ** -0.5, std

    @override
    def observe(self, release: NoisyRelease) -> None:
        assert self.value is not None
        below = release.statistics[0] / release.expected_batch_size + 0.5
        self._move(self.value * math.exp(min(max(-self.rate * (below - self.quantile), -50.0), 50.0)))


class PublishedBound(Bound):
    """The automatic bound of Auto DP-SGD as published, which is not private; for study only.

        G~ = C (sum_i g_i / (||g_i|| + gamma) + N(0, sigma^2)),     C = W mean_i ||g_i|| over THIS batch

    No guarantee: the scale of the noise is an un-noised function of the batch, so the divergence is unbounded.

    Args:
        weight: W > 0.
        gamma: stability constant of the scaling.
    """

    is_fixed = False
    num_statistics = 2
    unsound = "published automatic threshold: the noise's scale is an un-noised function of the batch"

    def __init__(self, weight: float = 1.0, gamma: float = 0.01) -> None:
        self.weight = check.check_positive("weight", weight)
        self._scaling = AutomaticClipping(gamma=check.check_nonnegative("gamma", gamma))

    @override
    def clipping(self, base: Clipping, step: int, num_groups: int) -> Clipping:
        return self._scaling if num_groups == 1 else AutomaticClipping(gamma=self._scaling.gamma, per_layer=True)

    @override
    def statistics(self, norms_B: Tensor) -> Tensor:
        finite = norms_B.isfinite()
        return torch.stack([torch.where(finite, norms_B, 0.0).sum(), finite.sum().to(norms_B.dtype)])

    @override
    def rescale(self, statistics: tuple[float, ...]) -> float:
        return self.weight * statistics[0] / max(statistics[1], 1.0)
