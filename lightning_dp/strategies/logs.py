"""A watch on logs during training, which names un-noised figures for the privacy statement, or drops them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info

from lightning_dp import _messages
from lightning_dp.metrics import Epsilon
from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.strategies._lightning import fit_results
from lightning_dp.strategies.overrides import Overrides

#: Prefix of names that this package logs: functions of public settings, and audits.
PUBLIC = ("privacy/", "audit/", "communication/")
NON_PRIVATE = "nonprivate/"


class TrainingLogs:
    """A filter between the hooks of the training loop and all destinations of their logs.

    All figures from ``self.log`` and ``self.log_dict``, in any hook of a module or callback during training, pass
    through one collection, from which Lightning fills loggers, progress bar and ``callback_metrics``. This object
    watches that collection, and calls of ``logger.log_metrics`` within ``training_step``.

    **Guarantee**: with ``strict=True`` such a figure is dropped, unless its name begins with ``nonprivate/``. Passed
    unchanged are validation and test figures, the ``Epsilon`` metric, and this package's own logs: ``epsilon`` and
    names under ``privacy/``, ``audit/`` and ``communication/``. NOT seen: ``print``, files, ``logger.experiment``, and
    values that user code keeps in its own objects.

    Args:
        trainer: the Trainer that fits.
        found: receives the names of figures that are logged without noise.
        strict: whether to drop such figures.
    """

    def __init__(self, trainer: pl.Trainer, found: set[str], *, strict: bool) -> None:
        self.found, self.strict = found, strict
        self.dropped: set[str] = set()
        self._in_step = self._is_muted = self._said_no_loss = False
        self._overrides = Overrides()
        results: Any = fit_results(trainer)
        self._overrides.set(results, "log", self._watched_log(results.log))
        for logger in trainer.loggers:
            self._overrides.set(logger, "log_metrics", self._watched_metrics(logger.log_metrics))

    def say_no_loss(self, weight: float) -> None:
        """Say once, as Lightning does, that a step without a loss is easily a mistake.

        Args:
            weight: of the step's records; 0 for an empty batch, of which nothing is said.
        """
        if weight and not self._said_no_loss:
            self._said_no_loss = True
            _messages.info(
                "training_step returned no loss, so this step releases noise alone, and counts towards epsilon all the "
                "same. If that is not on purpose, return the loss."
            )

    def detach(self) -> None:
        """Restore the Trainer and its loggers."""
        self._overrides.undo()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Drop all logs within the context, in which user code runs in the sandbox or on a dummy record of weight 0."""
        before, self._is_muted = self._is_muted, True
        try:
            yield
        finally:
            self._is_muted = before

    @contextmanager
    def in_training_step(self) -> Iterator[None]:
        """Watch, within the context of the user's ``training_step``, also figures given directly to a logger."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    def _passes(self, name: str, value: Any) -> bool:
        if name == "epsilon" or name.startswith(PUBLIC) or isinstance(value, Epsilon):
            return True
        if not self.strict or name.startswith(NON_PRIVATE):
            self.found.add(name)
            return True
        if name not in self.dropped:
            rank_zero_info(f"strict_logging=True: {name!r} is a figure of the training data and is not logged.")
        self.dropped.add(name)
        return False

    def _watched_log(self, log: Callable[..., None]) -> Callable[..., None]:
        def watched(fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if not self._is_muted and self._passes(name, value):
                with unfollowed():  # its operations are not the user's
                    log(fx, name, value, *args, **kwargs)

        return watched

    def _watched_metrics(self, log_metrics: Callable[..., None]) -> Callable[..., None]:
        """Return a logger's ``log_metrics`` with a filter on figures, which are the mappings among its arguments."""

        @functools.wraps(log_metrics)
        def watched(*args: Any, **kwargs: Any) -> None:
            if self._is_muted:
                return
            if self._in_step:
                args = tuple(map(self._passing, args))
                kwargs = {name: self._passing(value) for name, value in kwargs.items()}
                figures = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
                if figures and not any(figures):
                    return
            log_metrics(*args, **kwargs)

        return watched

    def _passing(self, value: Any) -> Any:
        """Return a mapping without forbidden figures, and any other object unchanged."""
        if not isinstance(value, Mapping):
            return value
        return {name: figure for name, figure in value.items() if self._passes(name, figure)}
