"""A clipping bound that changes over the run, by a public schedule."""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.callbacks.noise_scheduler import ScheduleCallback
from lightning_dp.clipping.bounds import ScheduledBound


class ClippingScheduler(ScheduleCallback):
    """A public schedule of the clipping bound.

        C_e = C_0 f(e),   e = epoch // every_n_epochs

    The kinds are the same as in ``NoiseScheduler``, with ``factor`` on C and ``rate`` on C^2. The paper's
    C_0 R^floor(epoch/K) is ``ClippingScheduler("step", factor=R, every_n_epochs=K)``.

    **Guarantee**: the schedule is public. The noise is scaled with the bound, so the ledger is unchanged.

    Args:
        kind: "constant", "linear", "time", "step", "exponential", "cosine", or a function from e to the factor on C.
        factor: finite and > 0. Exactly one of ``factor`` and ``rate`` for a named kind other than "constant".
        rate: finite and > 0.
        every_n_epochs: epochs (or steps, see ``interval``) between two changes, >= 1.
        interval: "epoch", or "step" to count logical steps instead.

    Raises:
        ValueError: numbers out of range; a second callback that sets the bound; a clipping without a bound.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> scheduler = ClippingScheduler("step", factor=0.5, every_n_epochs=10)

    References:
        Chilukoti et al. 2023, Auto DP-SGD, arXiv 2312.02400v1.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the schedule to the strategy when fit begins."""
        if stage == "fit":
            private_strategy(trainer, self).mechanisms.add(self, bound=ScheduledBound(self.schedule))
