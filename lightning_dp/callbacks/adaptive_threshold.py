"""Clipping bounds that adapt during the run: to noisy gradients, to a noisy quantile, or as Auto DP-SGD does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.clipping.bounds import Bound, NoisyGradientBound, PublishedBound, QuantileBound


class _BoundCallback(Callback):
    """A callback that passes a rule for the clipping bound to the strategy and saves the rule's state."""

    bound: Bound

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the rule to the strategy when fit begins; a new run begins with the strategy's bound."""
        if stage == "fit":
            if trainer.global_step == 0:
                self.bound.reset()  # a checkpoint, if any, is loaded later
            private_strategy(trainer, self).mechanisms.add(self, bound=self.bound)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the public values of the rule when a training batch ends."""
        pl_module.log_dict(self.bound.figures, batch_size=1)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the rule, such as the current bound."""
        return self.bound.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the rule when a run resumes."""
        self.bound.load_state_dict(state_dict)


class AutoThreshold(_BoundCallback):
    """A clipping bound that follows the noisy gradient of the previous step, at no privacy cost.

        C_{t+1} = clip(W sqrt(max(||g~_t||^2 - d sigma_t^2 C_t^2 / B^2, 0)), C_min, C_max)

    with g~ the noisy mean gradient, d the number of its active coordinates, and B the expected batch size. C_0 is the
    strategy's bound.

    **Guarantee**: post-processing of noisy releases. Sensitivity and noise follow C_t, so the ledger is unchanged. The
    bound is logged as ``privacy/max_grad_norm`` and is public. If noise dominates, the estimate is often 0, and C_t is
    then C_min.

    Args:
        weight: W > 0. A mean of clipped gradients is shorter than their bound, so W <= 1 can only shrink it.
        minimum: C_min; default C_0 / 10.
        maximum: C_max; default 10 C_0.

    Raises:
        ValueError: numbers out of range; several private optimizers; a clipping without a bound.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = AutoThreshold(weight=3.0, minimum=0.1, maximum=10.0)

    References:
        The sound variant of Chilukoti et al. 2023, Auto DP-SGD, arXiv 2312.02400v1, whose own threshold is not private.
    """

    def __init__(self, weight: float = 3.0, *, minimum: float | None = None, maximum: float | None = None) -> None:
        self.bound = NoisyGradientBound(weight, minimum, maximum)


class AdaptiveClipping(_BoundCallback):
    """A clipping bound that follows a noisy quantile of the gradient norms, for more noise on the gradient.

        b~ = (1/B) (sum_i (1[||g_i|| <= C] - 1/2) + N(0, s_b^2)) + 1/2,     C <- C exp(-rate (b~ - quantile))
        z_gradient = (z^-2 - (2 s_b)^-2)^(-1/2)

    **Guarantee**: the count is centred, so one sample moves it by 1/2, and it is released with the gradient. Together
    they have the noise multiplier z of the plan, so the ledger is unchanged. Under per-layer clipping, the norm of the
    whole gradient counts and all bounds move together. The bound is logged as ``privacy/max_grad_norm`` and is public.

    Args:
        quantile: target share of gradients below the bound, in (0, 1).
        rate: step size on log C, > 0.
        count_noise: s_b, std of the noise on the count; default max(B / 20, z), so that the gradient's noise grows by
            15 % at most.
        minimum: smallest bound; default C_0 / 10.
        maximum: largest bound; default 10 C_0.

    Raises:
        ValueError: numbers out of range; too little noise on the count; several private optimizers; a clipping without
            a bound.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = AdaptiveClipping(quantile=0.5)

    References:
        Andrew et al. 2021, Differentially Private Learning with Adaptive Clipping, section 2.
    """

    def __init__(
        self,
        quantile: float = 0.5,
        *,
        rate: float = 0.2,
        count_noise: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        self.bound = QuantileBound(quantile, rate, count_noise, minimum, maximum)


class PublishedAutoThreshold(_BoundCallback):
    """The automatic threshold of Auto DP-SGD as published, for study: epsilon is infinite.

        G~ = C (sum_i g_i / (||g_i|| + gamma) + N(0, sigma^2)),     C = W mean_i ||g_i|| over this batch

    No guarantee: C is an un-noised function of the batch and scales the noise, so one record changes the scale of the
    release and no epsilon bounds that. The ledger records every step as non-private. ``AutoThreshold`` is the sound
    variant.

    Args:
        weight: W > 0.
        gamma: stability constant of the scaling, >= 0.

    Raises:
        ValueError: numbers out of range; a run with ``target_epsilon``; a clipping without a bound or factors.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = PublishedAutoThreshold()

    References:
        Chilukoti et al. 2023, Auto DP-SGD, arXiv 2312.02400v1.
    """

    def __init__(self, weight: float = 1.0, *, gamma: float = 0.01) -> None:
        self.bound = PublishedBound(weight, gamma)
