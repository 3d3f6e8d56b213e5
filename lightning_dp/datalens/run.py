"""One DataLens run: plan, ledger, epsilon and checkpoints. The step is in ``module.py``."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_dp.accounting import make_accountant
from lightning_dp.datalens import statement, trainer_checks
from lightning_dp.datalens.plan import DataLensPlan
from lightning_dp.datalens.release import VoteRelease
from lightning_dp.datalens.settings import DataLensSettings
from lightning_dp.datalens.teachers import Teachers
from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.step.facts import StateFacts
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import default_delta
from lightning_dp.step.state import PrivacyState
from lightning_dp.strategies.run_length import remaining_steps
from lightning_dp.system import ProcessTuning


class _EndOnException(pl.Callback):
    """A callback that cleans up if a DataLens fit raises, because Lightning reports exceptions to callbacks only."""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, DataLensRun)
        pl_module.end_fit()


class DataLensRun(StateFacts, pl.LightningModule):
    """The base class of ``DataLens``: plan, ledger and checkpoints, for ``EpsilonMonitor`` and ``PrivacyBudget``.

    Args:
        settings: the user's arguments.
    """

    def __init__(self, settings: DataLensSettings) -> None:
        super().__init__()
        self.settings = settings
        self.state = PrivacyState(
            "replace_one",
            make_accountant(settings.accountant),
            seeded=settings.seed is not None,
            secure=settings.secure_rng,
        )
        self.mechanisms = Mechanisms()  # callbacks may request only a limit
        self._dataset_size: int | None = None
        self._teachers: Teachers | None = None
        self._release: VoteRelease | None = None
        self._tuning = ProcessTuning()

    # ---------------------------------------------------------------- what the user reads

    @property
    def plan(self) -> DataLensPlan:
        """The public settings of the run, built and calibrated at the first access after the data are set up.

        Raises:
            ValueError: no run has been set up yet, or the run cannot be planned.
        """
        if self.state.plan is None:
            if self._trainer is None or self._trainer.train_dataloader is None:
                raise ValueError(
                    "Expected a run with its training data set up, got none yet. Ask for the plan during or after fit."
                )
            self.state.plan = self._build_plan(self._trainer)
            self.settle_limit()
        return self.state.plan  # type: ignore[no-any-return]

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, from the ledger; public.

        Args:
            delta: in (0, 1); default: the plan's.

        Raises:
            ValueError: no steps recorded, which is not the same as epsilon 0.
        """
        if self.ledger.num_steps and delta is None and self.state.restored_plan is None:
            delta = self.plan.delta
        return self.state.epsilon(delta)

    def privacy_statement(self) -> str:
        """Return the privacy statement of the run."""
        return statement.privacy_statement(
            self.plan, self.ledger, self.accountant, seeded=self.settings.seed is not None
        )

    # ---------------------------------------------------------------- set up

    def _build_plan(self, trainer: pl.Trainer) -> DataLensPlan:
        settings = self.settings
        dataset = trainer_checks.dataset_of(trainer)
        trainer_checks.check_records(dataset, trainer_checks.collate_of(trainer))
        size = len(dataset)
        if self._dataset_size not in (None, size):
            raise PrivacyError(
                f"Expected the {self._dataset_size} records of the ledger's dataset, got {size}. Go on with the same "
                "training set, or make a new DataLens."
            )
        self._dataset_size = size
        remaining = remaining_steps(trainer, trainer.accumulate_grad_batches)
        delta = default_delta(size) if settings.target_delta is None else settings.target_delta
        plan = DataLensPlan(
            dataset_size=size,
            num_teachers=settings.num_teachers,
            top_k=settings.top_k,
            batch_size=settings.batch_size,
            noise_std=0.0 if settings.sigma is None else float(settings.sigma),
            threshold=settings.threshold,
            steps=None if remaining is None else self.state.step + remaining,
            delta=delta,
            target_epsilon=settings.target_epsilon,
            accountant=settings.accountant,
        ).calibrated(
            start=self.state.step, ledger=self.ledger, accountant=self.accountant, restored=self.state.restored_plan
        )
        self._preview(plan)
        return plan

    def _preview(self, plan: DataLensPlan) -> None:
        """Log the epsilon at the end of the planned run, if steps are left and bounded."""
        if plan.steps is None or plan.steps <= self.state.step:
            return
        ledger = self.ledger.extended(plan.runs(self.state.step, plan.steps))
        rank_zero_info(
            f"DataLens: {plan.num_teachers} teachers with {plan.shard_size} records each, noise {plan.noise_std:.5g} "
            f"on each sum of votes; epsilon={self.accountant.epsilon(ledger, plan.delta):.4g} at delta={plan.delta:g} "
            f"after {ledger.num_steps} steps."
        )

    @override
    def setup(self, stage: str) -> None:
        """Check the Trainer and reset the plan, before any data is read."""
        if stage != "fit":
            return
        trainer_checks.check_trainer(self.trainer, self.settings)
        self.state.plan = self.state.restored_plan = self._teachers = None
        if self.trainer.global_step == 0:
            self.state.step = 0
        if self._release is None or self._release.world_size != self.trainer.world_size:
            seed = self.settings.seed
            self._release = VoteRelease(
                world_size=self.trainer.world_size,
                seed=None if seed is None else seed * 1_000_003 + self.global_rank,
                secure=self.settings.secure_rng,
            )

    @override
    def teardown(self, stage: str) -> None:
        """Remove the step limit, which holds for one fit."""
        self.state.last_allowed_step = math.inf

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that cleans up if a fit raises."""
        return [_EndOnException()]

    def end_fit(self) -> None:
        """Free the teachers, end the noise threads, and undo the tuning of the process."""
        self._teachers = None
        if self._release is not None:
            self._release.close()
        self._tuning.stop()

    # ---------------------------------------------------------------- checkpoints: the generator and the ledger

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add ledger, plan and step to the checkpoint, which never holds teachers or shards."""
        checkpoint[saved.KEY] = self.state.state_dict(global_step=checkpoint.get("global_step", 0))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore ledger, plan and step from a checkpoint; refuse one without a ledger."""
        if saved.KEY not in checkpoint:
            raise PrivacyError(
                "Expected a checkpoint with a privacy ledger, got one without: what its weights have seen is unknown. "
                "Weights trained on public data can be loaded into the generator itself, before DataLens is made."
            )
        self.state.load(checkpoint, allow_public=False, one_step_a_batch=False)
        if self.state.restored_plan is not None:
            self._dataset_size = self.state.restored_plan["dataset_size"]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a pickle or a copy: everything except the teachers."""
        return {**super().__getstate__(), "_teachers": None}
