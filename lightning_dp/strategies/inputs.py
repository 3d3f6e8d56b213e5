"""TrainingInputs: module and training data as the user gave them, made fit for private steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from typing_extensions import override

from lightning_dp import _messages
from lightning_dp.fix import fix
from lightning_dp.sampling import LogicalBatch, PrivateDataLoader, private_dataloader
from lightning_dp.step import checks, correlation
from lightning_dp.strategies import _lightning, trainer_checks
from lightning_dp.strategies.facts import RunFacts

if TYPE_CHECKING:
    from lightning_dp.strategies.fit import PrivateFit


class TrainingInputs(RunFacts, Strategy):
    """The part of a private strategy that exchanges layers and training loaders."""

    global_rank: int
    world_size: int
    _loader: PrivateDataLoader | None
    _fit: PrivateFit | None
    _fixes: bool

    def fix_layers(self) -> None:
        """Exchange layers that cannot be trained privately, under ``fix=True``; a second call changes nothing."""
        if self._fixes:
            for change in fix(self.module).changes:
                _messages.info(f"fix: {change}.")

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights into the layers that they were trained in."""
        self.fix_layers()
        super().load_model_state_dict(checkpoint, strict)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Replace the training loader by one that draws logical batches; every other loader passes as it is."""
        trainer = self.trainer
        if not (trainer.state.fn == TrainerFn.FITTING and trainer.state.stage == RunningStage.TRAINING):
            return dataloader
        trainer_checks.check_single_loader(trainer)
        loader = private_dataloader(
            dataloader,  # type: ignore[arg-type]
            **trainer_checks.with_unit_ids(self.settings.drawing, trainer),
            accumulate=trainer.accumulate_grad_batches,
            rank=self.global_rank,
            world_size=self.world_size,
            num_batches_kept=trainer_checks.batches_kept(trainer),
            extra_records=self.mechanisms.extra_records,
        )
        checks.check_same_dataset(self._loader, loader)
        if self.state.plan is not None:
            correlation.check_reload(self.state.plan.correlation, self._loader, loader)
            correlation.begin_order(self.state.plan.correlation, loader, self.state.steps_taken)
        if self._loader is not None and self._loader.facts != loader.facts:
            self.state.plan = None  # another batch size: another sample rate from here on
        self._loader = loader
        return loader

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch; of a logical batch the last microbatch now, the others when they are used."""
        if isinstance(batch, LogicalBatch) and self._fit is not None:
            return self._fit.take(batch)
        trainer_checks.check_not_nested(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    def to_device(self, batch: Any) -> Any:
        """Do to one microbatch what Lightning's loop does to a batch before the step."""
        batch = _lightning.apply_transfer_hook(self.module, self.precision_plugin.convert_input(batch))
        return super().batch_to_device(batch, self.root_device, 0)
