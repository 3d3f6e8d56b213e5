"""Noise that changes over the run, by a public schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.run_length import RunLength
from lightning_dp.schedules import Schedule, make_schedule

Kind = Literal["constant", "linear", "time", "step", "exponential", "cosine"]
KINDS: tuple[str, ...] = get_args(Kind)
Interval = Literal["epoch", "step"]


@dataclass(frozen=True)
class PublicSchedule:
    """A kind of schedule with its settings; called with the run length, it returns a function of the step.

    Args:
        kind: one of ``KINDS``, or a function from the index of the interval (0, 1, ...) to a factor.
        factor: factor on the scheduled value; see ``lightning_dp.schedules.make_schedule``.
        rate: rate on the square of the scheduled value; see there.
        every_n_epochs: epochs of one interval, or steps with ``interval="step"``; >= 1.
        interval: "epoch" or "step".
    """

    kind: str | Callable[[int], float]
    factor: float | None
    rate: float | None
    every_n_epochs: int
    interval: str

    def __post_init__(self) -> None:
        if not callable(self.kind):
            check.check_choice("kind", self.kind, KINDS)
        check.check_count("every_n_epochs", self.every_n_epochs)
        check.check_choice("interval", self.interval, get_args(Interval))
        make_schedule(self.kind, factor=self.factor, rate=self.rate, every=1, over=1)

    def __call__(self, run: RunLength) -> Schedule:
        """Return the schedule for a run of this length.

        Raises:
            ValueError: the schedule needs the length of an epoch or of the run, which is unknown.
        """
        every = self.every_n_epochs
        if self.interval == "epoch":
            every *= run.epoch_steps("interval='epoch'", "Pass interval='step'.")
        if self.kind in ("linear", "cosine") and self.factor is not None:
            run.total_steps(f"kind={self.kind!r} and factor")
        over = max(1, ((run.steps or 1) - 1) // every * every)  # where the last interval begins
        return make_schedule(self.kind, factor=self.factor, rate=self.rate, every=every, over=over)


class ScheduleCallback(Callback):
    """A callback with a public schedule, made from the arguments that its subclasses document."""

    def __init__(
        self,
        kind: Kind | Callable[[int], float],
        *,
        factor: float | None = None,
        rate: float | None = None,
        every_n_epochs: int = 1,
        interval: Interval = "epoch",
    ) -> None:
        self.schedule = PublicSchedule(kind, factor, rate, every_n_epochs, interval)


class NoiseScheduler(ScheduleCallback):
    """A public schedule of the noise multiplier.

        sigma_e = sigma_0 f(e),   e = epoch // every_n_epochs  (or step // every_n_epochs with ``interval="step"``)

    | kind | with ``factor`` (on SIGMA) | with ``rate`` R (on the VARIANCE, as in the paper) |
    |---|---|---|
    | "constant" | - | - |
    | "step" | factor^e | R^(e/2) |
    | "exponential" | factor^e | exp(-R e / 2) |
    | "linear" | straight line from 1 to factor at the end of the run | R^(e/2): geometric, as published |
    | "time" | - | (1 + R e)^(-1/2) |
    | "cosine" | half a cosine from 1 to factor at the end of the run | - |
    | a function | called with e, returns the factor on sigma | - |

    Constant noise was as good at the same epsilon (``benchmarks/claims.md``); four plateaus of "step" with a factor of
    0.8 to 0.9 are a mild schedule. Under ``target_epsilon`` sigma_0 is calibrated over the whole schedule.

    **Guarantee**: the schedule is public, and each step is recorded in the ledger with its own sigma. The epsilon of an
    "equivalent constant sigma" is never reported, because it would be too small.

    Args:
        kind: see the table.
        factor: finite and > 0. Exactly one of ``factor`` and ``rate`` for a named kind other than "constant".
        rate: finite and > 0.
        every_n_epochs: epochs (or steps, see ``interval``) between two changes, >= 1.
        interval: "epoch", or "step" to count logical steps instead.

    Raises:
        ValueError: numbers out of range or that do not belong to the kind; a second scheduler in the same Trainer.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> scheduler = NoiseScheduler("step", factor=0.9, every_n_epochs=5)

    References:
        Chilukoti et al. 2023, Auto DP-SGD, arXiv 2312.02400v1 (the forms with ``rate``).
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Pass the schedule to the strategy when fit begins, before the plan is built."""
        if stage == "fit":
            private_strategy(trainer, self).mechanisms.add(self, noise_schedule=self.schedule)
