"""TrainingInputs: converts the user's module and training data for private steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from typing_extensions import override

from lightning_dp import _messages
from lightning_dp.fix import fix
from lightning_dp.sampling import LogicalBatch, PrivateDataLoader, one_loader, private_dataloader
from lightning_dp.step import checks, correlation
from lightning_dp.step.history import note_checkpoint
from lightning_dp.strategies import _lightning, trainer_checks
from lightning_dp.strategies.facts import RunFacts
from lightning_dp.strategies.hooks import has_transfer
from lightning_dp.trials.loading import LoadingWatch


class TrainingInputs(RunFacts, Strategy):
    """The component of a private strategy that replaces layers and training loaders."""

    global_rank: int
    world_size: int
    _fixes: bool
    _undo: list[Callable[[], None]]

    def fix_layers(self) -> None:
        """Replace layers that cannot be trained privately, under ``fix=True``; a second call does nothing."""
        if self._fixes:
            for change in fix(self.module).changes:
                _messages.info(f"fix: {change}.")

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights after ``fix=True`` has replaced layers, because the weights belong to the new layers."""
        self.fix_layers()
        super().load_model_state_dict(checkpoint, strict)
        note_checkpoint(self.module, checkpoint)

    def _take_training_data(self) -> None:
        """Convert the training data of this fit, whatever its form, to one loader."""
        self._return_training_data()
        self._undo = [_lightning.change_training_source(self.trainer, self._one_loader)]

    def _return_training_data(self) -> None:
        """Restore the Trainer's own access to its training data."""
        while self._undo:
            self._undo.pop()()

    def _one_loader(self, given: Any, mode: str) -> Any:
        return one_loader(given, sampling=self.settings.sampling, mode=mode)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader by one that draws logical batches; return every other loader unchanged."""
        trainer = self.trainer
        if not (trainer.state.fn == TrainerFn.FITTING and trainer.state.stage == RunningStage.TRAINING):
            return dataloader
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        if isinstance(overfit, float) and overfit > 0:
            self._undo.append(_lightning.use_whole_loader(trainer))  # the private loader already includes the share
        for parts in {*trainer_checks.accumulation(trainer).values()}:  # each must be possible before the first step
            self._private(dataloader, parts)
        loader = self._private(dataloader, trainer_checks.parts_now(trainer))
        loader.before_pass, loader.before_item = partial(self._follow_accumulation, dataloader), self._before_item
        checks.check_same_dataset(self._loader, loader)
        if self.state.plan is not None:
            correlation.check_reload(self.state.plan.correlation, self._loader, loader)
            correlation.begin_order(self.state.plan.correlation, loader, self.state.steps_taken)
        if self._loader is not None and self._loader.facts != loader.facts:
            self.state.plan = None  # another batch size: another sample rate from here on
        self._loader = loader
        return loader

    def _private(self, dataloader: Any, parts: int) -> PrivateDataLoader:
        trainer = self.trainer
        return private_dataloader(
            dataloader,
            **trainer_checks.with_unit_ids(self.settings.drawing, trainer),
            accumulate=parts,
            rank=self.global_rank,
            world_size=self.world_size,
            num_batches_kept=trainer_checks.batches_kept(trainer, dataloader, parts),
            extra_records=self.mechanisms.extra_records,
            watch=self._watch(trainer),
        )

    def _watch(self, trainer: Any) -> LoadingWatch | None:
        """Return the watch of data loading, unless the user has switched checks off."""
        has_users, always = self.settings.unit is not None, has_transfer(trainer, self.module)
        return LoadingWatch(always=always, keeps_order=has_users) if self.settings.check_per_sample else None

    def _follow_accumulation(self, dataloader: Any) -> None:
        """Draw logical batches of another size from this epoch on, if ``GradientAccumulationScheduler`` changes it."""
        if self._loader is None or not trainer_checks.accumulation(self.trainer):
            return
        parts = trainer_checks.parts_now(self.trainer)
        if parts != self._loader.facts.accumulate:
            self._loader.draw_as(self._private(dataloader, parts))
            self.state.plan = None
            _messages.info(
                f"Logical batches hold {self._loader.facts.expected_batch_size} records from here on, as expected."
            )

    def _before_item(self) -> Callable[[], Mapping[Any, Any]]:
        return dict if self._fit is None else self._fit.before_item()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch; of a logical batch, move the last microbatch now and the others when they are used."""
        if isinstance(batch, LogicalBatch) and self._fit is not None:
            return self._fit.take(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def to_device(self, batch: Any) -> Any:
        """Prepare one microbatch as Lightning's loop prepares a batch before the step."""
        batch = self.precision_plugin.convert_input(batch)
        if not has_transfer(self.trainer, self.module):
            return move_data_to_device(batch, self.root_device)  # what Lightning's own hooks do, in a third of the time
        return super().batch_to_device(_lightning.apply_transfer_hook(self.module, batch), self.root_device, 0)
