"""A callback that replaces layers that cannot be trained privately."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dp import _messages
from lightning_dp.fix import fix


class FixModule(Callback):
    """A callback that applies ``lightning_dp.fix`` in ``setup``, for packages that create module and Trainer.

    Layers that the module creates later, in its own ``setup`` or ``configure_model``, are not replaced: use
    ``DPStrategy(fix=True)`` for them. The callback works with every strategy, so a non-private run can train the same
    layers.

    No guarantee of its own: see ``fix``.

    Raises:
        ValueError: a lazy layer has not seen its first batch.

    Example:
        >>> callback = FixModule()
        >>> callback.changes
        []
    """

    def __init__(self) -> None:
        self.changes: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace layers when a stage begins, before optimizers are created and weights are loaded."""
        changes = fix(pl_module).changes
        self.changes += changes
        for change in changes:
            _messages.info(f"fix: {change}.")
