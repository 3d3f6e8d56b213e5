"""Effects of clipping and noise on the gradient, logged without noise: for study."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.step.diagnostics import ClippingDiagnostics


class GradientDiagnostics(Callback):
    """Un-noised figures of every logical batch; they are not private, and their names say so.

        nonprivate/clip_fraction    share of samples that clipping shortened
        nonprivate/clipping_bias    cosine between the clipped and the raw sum
        nonprivate/noise_to_signal  expected norm of the noise over the norm of the clipped sum

    No guarantee for what it logs: the figures are functions of the training data without noise, which epsilon does not
    cover; the privacy statement lists them. The training itself is unchanged. In N processes they are rank 0's share.

    Args:
        every_n_steps: logical steps between two values, >= 1.

    Raises:
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = GradientDiagnostics(every_n_steps=10)

    References:
        Watson et al. 2023, Inference and Interference, arXiv 2311.06839.
    """

    def __init__(self, *, every_n_steps: int = 1) -> None:
        self.every_n_steps = check.check_count("every_n_steps", every_n_steps)
        self._diagnostics = ClippingDiagnostics()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the strategy for the figures when a stage begins."""
        if stage == "fit":
            self._diagnostics = ClippingDiagnostics()
            private_strategy(trainer, self).mechanisms.add(self, diagnostics=self._diagnostics)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the figures of the last logical batch when a training batch ends."""
        steps = private_strategy(trainer, self).steps_taken
        if steps % self.every_n_steps == 0:
            figures = {f"nonprivate/{name}": value for name, value in self._diagnostics.take().items()}
            pl_module.log_dict(figures, batch_size=1)
