"""The privacy card of a run, in a folder that the user chooses."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.callbacks._strategy import private_strategy
from lightning_dp.reporting.files import CardFiles


class PrivacyCard(Callback):
    """A callback that sets the folder of the privacy card: ``privacy_card.json``, ``.md`` and ``.svg``.

    A private strategy writes the card at the end of ``fit`` into the logger's directory. Use this callback to choose
    the folder, to have a card without a logger (in ``default_root_dir``), or to switch the card off. No card is written
    under ``fast_dev_run`` or before the first step. The plot of epsilon over steps needs matplotlib (the extra
    "examples"); without matplotlib the card has a table. Rank 0 writes; a failure to write only warns.

    **Guarantee**: the card holds public values only, computed from settings and ledger. It covers the whole ledger:
    resumed runs and learning-rate searches too.

    Args:
        dirpath: directory for the files, created if missing; default: the logger's, else ``default_root_dir``.
        enabled: False writes no card at all.

    Raises:
        TypeError: the Trainer's strategy is not a private one, or arguments of the wrong kind.

    Example:
        >>> card = PrivacyCard(dirpath="out")

    References:
        Ponomareva et al. 2023, How to DP-fy ML, section 5.3.
    """

    def __init__(self, dirpath: str | Path | None = None, *, enabled: bool = True) -> None:
        if dirpath is not None and not isinstance(dirpath, (str, Path)):
            raise TypeError(
                f"Expected dirpath to be a path, got dirpath={dirpath!r}. Pass a directory, or leave it out."
            )
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.enabled = check.check_flag("enabled", enabled)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the folder of the privacy card when fit begins."""
        if stage == "fit":
            files = CardFiles(self.enabled, self.dirpath, fallback=trainer.default_root_dir)
            private_strategy(trainer, self).mechanisms.add(self, card=files)
