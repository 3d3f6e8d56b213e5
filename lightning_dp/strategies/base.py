"""PrivateStrategy: the mixin that makes a Lightning strategy private; its hooks call the private step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp import _messages
from lightning_dp import _validate as check
from lightning_dp.clipping import Clipping
from lightning_dp.noise import CorrelatedNoise, GaussianNoise
from lightning_dp.sampling import Unit
from lightning_dp.step import checkpoint as saved
from lightning_dp.step import checks, correlation, module_checks
from lightning_dp.step.history import History, note_checkpoint, note_values
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.settings import (
    AccountantName,
    ClippingName,
    GradSample,
    LossReduction,
    Relation,
    Sampling,
    Settings,
    UnitGradient,
)
from lightning_dp.step.state import PrivacyState
from lightning_dp.strategies import _lightning, card_files, checkpoint_io, lazy, trainer_checks
from lightning_dp.strategies.fit import PrivateFit
from lightning_dp.strategies.inputs import TrainingInputs
from lightning_dp.system import ProcessTuning

_lightning.note_loaded_checkpoints(note_checkpoint)


def _without_trainer() -> dict[str, Any]:
    """Return the attributes that a strategy has from its Trainer or holds while it fits, as they are before."""
    empty = {name: list[Any]() for name in ("_undo", "_optimizers", "_lightning_optimizers", "lr_scheduler_configs")}
    missing = dict.fromkeys(("_fit", "_noise", "_loader", "_accelerator", "_lightning_module", "_model"))
    return {**empty, **missing, "mechanisms": Mechanisms()}


class PrivateStrategy(TrainingInputs, Strategy):
    """A mixin that makes a Lightning strategy private; its public subclasses document the arguments."""

    _used_accelerator: Accelerator | None = None

    def __init__(
        self,
        *,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        max_grad_norm: float = 1.0,
        clipping: ClippingName | Clipping = "flat",
        accountant: AccountantName = "pld",
        sampling: Sampling = "poisson",
        microbatch_size: int | None = None,
        grad_sample: GradSample = "auto",
        neighboring_relation: Relation = "add_or_remove_one",
        memory: Literal["fast", "lean"] = "fast",
        check_per_sample: bool = True,
        allow_public_checkpoint: bool = False,
        secure_rng: bool = False,
        seed: int | None = None,
        loss_reduction: LossReduction = "auto",
        public_optimizers: Sequence[int] = (),
        strict_logging: bool = False,
        history: History = None,
        tune_process: bool = True,
        per_sample_loss: bool = False,
        fix: bool = False,
        unit: Unit | None = None,
        records_per_unit: int | None = None,
        unit_gradient: UnitGradient = "mean",
        noise: CorrelatedNoise | None = None,
        fixed_order: bool = False,
        **strategy_options: Any,
    ) -> None:
        check.check_keywords(strategy_options, trainer_checks.known_arguments(type(self)), owner=type(self).__name__)
        self.settings = settings = Settings.of(locals())
        super().__init__(**strategy_options)
        _lightning.serve_both(type(self))
        self.state = PrivacyState.of(settings, history)
        self.mechanisms = Mechanisms()
        self._noise: GaussianNoise | None = None
        self._tuning = ProcessTuning(settings.tune_process)
        self._fixes = check.check_flag("fix", fix)
        self._loader, self._fit, self._undo = None, None, []

    # ---------------------------------------------------------------- set up and tear down

    def make_reduction(self) -> Reduction:
        """Return the object that communicates between the processes of this strategy."""
        return Reduction()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Check Trainer, module and optimizers, and make the private step of a fit. Only lazy layers need data here."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        trainer_checks.check_trainer(trainer, self.settings)
        self._take_training_data()
        lazy.give_shapes(self)
        self.fix_layers()
        trainer_checks.check_module(self.module)
        self.state.count_earlier_runs(self.module)
        self.state.begin_step()
        if self.state.plan is not None:
            self.state.plan = self._loader = None  # else `estimated_stepping_batches` has asked for the loader first
        super().setup(trainer)
        module_checks.check_optimizers(self.optimizers, self.module, self.settings.public_optimizers)
        self.state.note_unledgered(trainer.global_step, (each.state.values() for each in self.optimizers))
        if self.state.restored_plan is None and trainer.global_step == 0:
            self.state.step = 0
        if self._noise is None:
            self._noise = self.settings.make_noise(self.global_rank)
        self._tuning.start(on_cpu=self.root_device.type == "cpu")
        said = [describe(trainer, self.module) for describe in trainer_checks.DESCRIPTIONS]
        for message in filter(None, (self._tuning.describe(), *said)):
            _messages.info(message)
        self._fit = PrivateFit(self, self._noise)

    @override
    def teardown(self) -> None:
        """Restore module, optimizers, loggers and process settings."""
        if self._fit is not None:
            self._fit.close()
            self._fit = None
        if self._noise is not None:
            self._noise.close()
        self._return_training_data()
        self._tuning.stop()
        self.mechanisms, self.state.last_allowed_step = Mechanisms(), math.inf
        super().teardown()
        # a second Trainer refuses a strategy that has an accelerator; the first one still finds it below
        self._used_accelerator, self._accelerator = self.accelerator, None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds, such as one among hyperparameters: settings and ledger, but neither
        module, data, noise nor sums of a fit. Only a process that this one starts gets all.
        """
        return vars(self) | (_without_trainer() if get_spawning_popen() is None else {})

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        """The accelerator of the current or last Trainer of this strategy."""
        return self._accelerator if self._accelerator is not None else self._used_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @override
    def on_train_start(self) -> None:
        """Build the plan before the first step, so that an unreachable target raises an error early."""
        self.state.check_history(self.module)
        module_checks.check_layers(self.module, runs_samples_alone=self.settings.counts_samples_alone)
        correlation.begin_order(self.plan.correlation, self.loader, self.state.steps_taken)
        self.state.decided = self.mechanisms.described()
        self.state.choices |= trainer_checks.choices_by_figures(self.trainer)
        super().on_train_start()

    @override
    def on_train_end(self) -> None:
        """Run the last checks, write the privacy card and report the privacy spent."""
        super().on_train_end()
        assert self._fit is not None
        self._fit.check_end()
        if any(each.param_groups for each in self.optimizers):  # else nothing trains, and Lightning says so
            self._fit.step.check_released()
        _ = self.plan  # made again where a checkpoint was loaded after the last step
        card_files.write(self.trainer, self, self.mechanisms.card)
        _messages.info(self.state.summary_line())

    # ---------------------------------------------------------------- the step

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run all microbatches of a logical batch; under automatic optimization Lightning runs the last backward."""
        assert self._fit is not None
        return self._fit.run(args[1:], kwargs)

    def call_training_step(self, batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the user's ``training_step``."""
        if self._fit is not None:
            self._fit.step.engine.see(batch)
        return super().training_step(batch, *rest, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Back-propagate one microbatch; under automatic optimization, add its clipped sum immediately."""
        if closure_loss.dim() > 0:
            closure_loss = checks.reduced(closure_loss, self.state.loss_reduction)
        if self._fit is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        self._fit.see_loss(closure_loss)
        with nullcontext() if self._runs_backward(closure_loss) else checks.reached(closure_loss):
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        self._fit.backward_done()
        return loss

    def _runs_backward(self, loss: Tensor) -> bool:
        """Tell whether the code that back-propagates a loss is Lightning's and torch's own, so that it does."""
        own = _lightning.runs_backward(self.module, self.precision_plugin)
        return own and type(loss) is Tensor and not vars(loss)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer on a private gradient, computed before ``on_before_optimizer_step`` hooks run."""
        fit = self._fit
        assert fit is not None
        if optimizer not in self.optimizers:  # Lightning's stand-in where configure_optimizers returned None
            return self._step(optimizer, closure, model, **kwargs)
        index = self.optimizers.index(optimizer)
        if fit.on_trial and not (fit.patches.is_rehearsing and index in fit.step.accumulators):
            closure()
            fit.step.intercept(index)
            return None
        outputs: list[Any] = []

        def private_closure() -> Any:
            with fit.guard.user_code():
                outputs.append(closure())
                fit.check_new_loss()
            fit.step.finish(index)
            fit.patches.released(optimizer)
            fit.guard.released()
            return outputs[-1] if fit.on_trial else None  # the loss carries no noise: no optimizer may use it

        with fit.guard.stepping(optimizer, private_closure), fit.only_own_callbacks():
            self._step(optimizer, private_closure, model, **kwargs)
        fit.patches.stepped()
        return outputs[-1] if outputs else None

    def _step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any, **kwargs: Any) -> Any:
        return self.precision_plugin.optimizer_step(optimizer, model=model or self.module, closure=closure, **kwargs)

    # ---------------------------------------------------------------- checkpoints

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's checkpoint IO, or an atomic writer."""
        self._checkpoint_io = _lightning.wrap_checkpoint_io(self._checkpoint_io, checkpoint_io.WholeCheckpointIO)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Add ledger, plan and logical step to the checkpoint; the weights keep the keys of the user's module."""
        if self._fit is not None:
            if self._fit.on_trial:
                return  # a trial leaves nothing behind
            self._fit.check_callbacks()
        note_values(self.module.parameters())
        checkpoint[saved.KEY] = self.state.state_dict(global_step=checkpoint.get("global_step", 0))
        # they are empty, and a Trainer without privacy would fail to match them to loaders
        _lightning.drop_loader_states(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint; on resume, restore its ledger and plan, and refuse a checkpoint without a ledger."""
        with checkpoint_io.reading(checkpoint_path):
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if _lightning.is_fitting(self.lightning_module):
            self.state.load(
                checkpoint,
                allow_public=self.settings.allow_public_checkpoint,
                one_step_a_batch=self.module.automatic_optimization,
            )
        return checkpoint
