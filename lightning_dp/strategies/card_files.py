"""The files of a run's privacy card."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_dp.reporting.card import privacy_card
from lightning_dp.reporting.card_markdown import to_markdown
from lightning_dp.reporting.card_plot import can_plot, plot_card
from lightning_dp.reporting.files import CardFiles
from lightning_dp.strategies import _lightning

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy

JSON, MARKDOWN, PLOT = "privacy_card.json", "privacy_card.md", "privacy_card.svg"


def logger_directory(trainer: pl.Trainer) -> str | None:
    """Return the directory of the first logger's run, on every rank; None if this logger has none."""
    directory: str | None = None
    if trainer.loggers:
        logger = trainer.loggers[0]
        if _lightning.is_a(logger, CSVLogger) or _lightning.is_a(logger, TensorBoardLogger):
            directory = logger.log_dir
        elif logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            directory = os.path.join(logger.save_dir, str(logger.name), version)
    return trainer.strategy.broadcast(directory)


def write(trainer: pl.Trainer, strategy: PrivateStrategy, files: CardFiles) -> str | None:
    """Write the card as JSON, Markdown and, with matplotlib, a plot; rank 0 only. Call it on every rank.

    If a file cannot be written, only a warning is given, because the training that the card describes is done.

    Args:
        trainer: nothing is written under ``fast_dev_run``.
        strategy: strategy of the run.
        files: destination of the card, if any.

    Returns:
        The directory, on every rank; None if there was nothing to write.
    """
    if not files.enabled or trainer.fast_dev_run or strategy.ledger.num_steps == 0:  # type: ignore[attr-defined]
        return None
    target = files.directory or logger_directory(trainer) or files.fallback
    if not target:
        return None
    if trainer.is_global_zero:
        try:
            _write(strategy, target)
        except OSError as error:
            rank_zero_warn(f"The privacy card could not be written to {target}: {error}")
    return target


def _write(strategy: PrivateStrategy, directory: str) -> None:
    card = privacy_card(strategy.plan, strategy.ledger, strategy.accountant, notes=strategy.notes)
    accounting, picture = card["accounting"], None
    if can_plot():
        picture = plot_card(
            accounting["epsilon_over_steps"],
            card["attacks"]["curve"],
            delta=card["delta"],
            target=accounting["target_epsilon"],
        )
    files: dict[str, bytes] = {
        JSON: json.dumps(card, indent=2).encode(),
        MARKDOWN: to_markdown(card, plot=PLOT if picture else None).encode(),
    }
    if picture:
        files[PLOT] = picture
    system = get_filesystem(directory)
    system.makedirs(directory, exist_ok=True)
    for name, content in files.items():
        with system.open(os.path.join(directory, name), "wb") as file:
            file.write(content)
