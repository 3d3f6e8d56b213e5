"""Un-noised values that show the effects of clipping and noise on the gradient, for study."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.step.diagnostics import ClippingDiagnostics


class GradientDiagnostics(Callback):
    """Un-noised values of logical batches for the loggers; they are not private, as their names say.

        nonprivate/clip_fraction    share of samples that clipping shortened
        nonprivate/clipping_bias    cosine between the clipped and the raw sum
        nonprivate/noise_to_signal  expected norm of the noise over the norm of the clipped sum

    No guarantee for the logged values: they are functions of the training data without noise, which epsilon does not
    cover. The privacy statement lists them. The training itself is unchanged. In several processes, the values
    cover the samples of rank 0 only.

    Args:
        every_n_steps: logical steps between two values, >= 1.

    Raises:
        ValueError: numbers out of range; several private optimizers.
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
        """Request the values from the strategy when fit begins."""
        if stage == "fit":
            self._diagnostics = ClippingDiagnostics()
            private_strategy(trainer, self).mechanisms.add(self, diagnostics=self._diagnostics)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values of the last logical batch when a training batch ends, if they are due."""
        steps = private_strategy(trainer, self).steps_taken
        if steps % self.every_n_steps == 0:
            figures = {f"nonprivate/{name}": value for name, value in self._diagnostics.take().items()}
            pl_module.log_dict(figures, batch_size=1)
