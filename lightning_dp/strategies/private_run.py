"""One private run: what the user asked for, the plan, the ledger, what is attached to the module, checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.accounting import Ledger, make_accountant
from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Threshold
from lightning_dp.noise import GaussianNoise
from lightning_dp.per_sample import make_engine
from lightning_dp.reporting import statement
from lightning_dp.sampling import LogicalBatch, PrivateDataLoader
from lightning_dp.step.accumulator import ClippedSum
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.settings import AccountantName, ClippingName, LossReduction, Relation, Sampling, Settings
from lightning_dp.strategies import card_files, planning, trainer_checks
from lightning_dp.strategies.logs import TrainingLogs
from lightning_dp.strategies.saving import SavedRun
from lightning_dp.system.allocator import give_back_freed_memory, keep_freed_memory


class PrivateRun(SavedRun):
    """Differentially private training for any LightningModule, as a mixin over a Lightning strategy.

    A logical step ``t`` is one optimizer step over one Poisson sample ``S_t`` of the data (each record joins with
    probability ``q = expected_batch_size / dataset_size``):

        G~ = sum_{i in S_t} factor_i g_i + N(0, (sigma_t C)^2 I),     p.grad = G~ / expected_batch_size

    where ``g_i`` is the gradient of one sample's loss and ``||factor_i g_i|| <= C``. The module and the datamodule are what
    they were; checkpoints keep the plain module's keys.

    **Guarantee**: the weights after any number of steps are (epsilon, delta)-differentially private at
    ``epsilon(delta)``, for the relation between neighbouring datasets in ``neighboring_relation``, provided that the
    forward pass treats samples independently (checked at the first batch) and that no state of the module but its
    parameters carries data. NOT covered: what ``training_step`` logs, validation data, and choices made by looking at either.

    Args:
        noise_multiplier: noise std over sensitivity, >= 0. Exactly one of this and ``target_epsilon``; 0 is a legal ablation
            whose epsilon is infinite.
        target_epsilon: calibrate the noise so that the whole planned run ends at this epsilon or just below.
        target_delta: delta, in (0, 1). Default: 1 / (10 x dataset size) rounded down to a power of ten; printed.
        max_grad_norm: clipping norm C > 0 of one sample's gradient.
        clipping: "flat", "per_layer", "automatic", "psac", "none" or a ``Clipping``.
        accountant: "pld" (tight), "rdp", "prv", "gdp" (nothing sampled) or "tcdp" (a loose cross-check).
        sampling: "poisson", or "shuffle": each record in exactly one batch per pass. Streams need "shuffle".
        microbatch_size: at most so many samples on the device at once; results do not depend on it. 1 runs each sample alone
            and supports every module. Default: the whole logical batch at once.
        grad_sample: "auto", or "materialize" for plain per-sample gradients of every layer (the reference).
        neighboring_relation: "add_or_remove_one", "replace_one" (doubles the sensitivity) or "zero_out".
        memory: "fast" or "lean".
        check_per_sample: at the first batch, compare a few per-sample gradients with each sample run alone.
        allow_public_checkpoint: accept a checkpoint without a ledger, asserting that it never saw private data.
        secure_rng: draw the noise from a cryptographic generator against floating-point attacks (slower).
        seed: for tests only: makes sampling and noise predictable, which voids the guarantee against those who know it.
        loss_reduction: "mean" or "sum": how a scalar loss combines the samples. A loss of shape (B,) needs neither.
        public_optimizers: positions, in what ``configure_optimizers`` returns, of optimizers whose parameters never receive a
            gradient from the data (a GAN's generator). Checked at the first batch.
        strict_logging: drop what hooks of the training loop log (``self.log``, ``self.log_dict``, and ``log_metrics`` of a
            logger within ``training_step``) unless it is named ``nonprivate/...``; validation logs and epsilon stay. What was
            logged without noise is named in ``privacy_statement()`` either way.
        **strategy_options: what the Lightning strategy takes.

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1.
    """

    global_rank: int
    world_size: int

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
        grad_sample: Literal["auto", "materialize"] = "auto",
        neighboring_relation: Relation = "add_or_remove_one",
        memory: Literal["fast", "lean"] = "fast",
        check_per_sample: bool = True,
        allow_public_checkpoint: bool = False,
        secure_rng: bool = False,
        seed: int | None = None,
        loss_reduction: LossReduction = "mean",
        public_optimizers: Sequence[int] = (),
        strict_logging: bool = False,
        **strategy_options: Any,
    ) -> None:
        if not isinstance(public_optimizers, Sequence):
            raise TypeError(
                f"Expected public_optimizers to be a list of positions, got public_optimizers={public_optimizers!r}. Pass [0] for the "
                "first optimizer that configure_optimizers returns."
            )
        self.settings = Settings(
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            accountant=accountant,
            sampling=sampling,
            microbatch_size=microbatch_size,
            grad_sample=grad_sample,
            neighboring_relation=neighboring_relation,
            memory=memory,
            check_per_sample=check_per_sample,
            allow_public_checkpoint=allow_public_checkpoint,
            secure_rng=secure_rng,
            seed=seed,
            loss_reduction=loss_reduction,
            public_optimizers=check.check_positions(
                "public_optimizers",
                public_optimizers,
                "Pass the place of each public optimizer in what configure_optimizers returns.",
            ),
            strict_logging=strict_logging,
        )
        super().__init__(**strategy_options)
        self.ledger = Ledger(neighboring_relation)
        self.accountant = make_accountant(accountant)
        self.mechanisms = Mechanisms()
        self.nonprivate_logs: set[str] = set()
        self._logs: TrainingLogs | None = None
        self.writes_card = True  # a PrivacyCard in the Trainer's callbacks does it instead
        self._seeded, self._secure = seed is not None, secure_rng
        self.audits: list[str] = []
        self.budget: Callable[[PrivateRun], int] | None = None
        self.last_allowed_step: int | None = None
        self._step = 0
        self._restored_plan: dict[str, Any] | None = None
        self._unledgered = 0
        self._noise: GaussianNoise | None = None
        self._reset_fit()

    def _reset_fit(self) -> None:
        """Forgets everything that belongs to one call of ``Trainer.fit``."""
        self._plan: DPPlan | None = None
        self._loader: PrivateDataLoader | None = None
        self._engine: Any = None
        self._clipping: Clipping = self.settings.make_clipping()
        self._sums: dict[int, ClippedSum] = {}
        self._batch: LogicalBatch | None = None
        self._on_device: Any = None
        self._stand_in: Any = None
        self._probe: Any = None
        self._prepared = self._recording = self._deferring = self._partial = False
        self._part = 0
        self._threshold = Threshold()
        self._scale = self._batch_precision = 0.0
        self._unfinished: set[int] = set()
        self._collected: set[int] = set()
        self._unchecked_public: set[int] = set()
        self._training_flags: list[bool] = []

    # ---------------------------------------------------------------- what the user reads

    @property
    def plan(self) -> DPPlan:
        """The public settings of the run; built, and its noise calibrated, when it is first asked for after data setup.

        Raises:
            ValueError: no run has been set up yet.
        """
        if self._plan is None:
            if self._loader is None:
                raise ValueError(
                    "Expected a run with its training data set up, got none yet. Ask for the plan during or after fit."
                )
            self._plan = planning.build_plan(
                self._trainer,
                self.settings,
                self._loader.facts,
                self.mechanisms,
                start=self.steps_taken,
                ledger=self.ledger,
                accountant=self.accountant,
                restored=self._restored_plan,
            )
            if self.budget is not None:
                self.last_allowed_step = self.budget(self)
        return self._plan

    @property
    def bytes_per_step(self) -> int:
        """Size of what one rank hands to the all-reduce of a logical step: live coordinates only."""
        return sum(sums.payload_bytes for sums in self._sums.values())

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far, from the ledger. It is not private itself: it depends on public settings only.

        Args:
            delta: in (0, 1); default: the plan's.

        Raises:
            ValueError: no steps recorded, which is not the same as epsilon 0.
        """
        if self.ledger.num_steps == 0:
            raise ValueError(
                "Expected at least one private step, got no steps recorded. Ask for epsilon once training has begun."
            )
        return self.accountant.epsilon(self.ledger, self.plan.delta if delta is None else delta)

    def privacy_statement(self) -> str:
        """What holds for whom, in a few lines: epsilon and delta, relation, sampling, accountant, and what is not covered."""
        return statement.privacy_statement(
            self.plan,
            self.ledger,
            self.accountant,
            seeded=self._seeded,
            nonprivate_logs=self.nonprivate_logs,
            audits=self.audits,
        )

    # ---------------------------------------------------------------- set up and tear down

    @property
    def _trainer(self) -> pl.Trainer:
        return self._module.trainer

    @property
    def _module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _runs_samples_alone(self) -> bool:
        return self.settings.microbatch_size == 1

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Checks Trainer, module and optimizers before any data is touched, and attaches the per-sample engine."""
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        trainer_checks.check_trainer(trainer, self.settings)
        trainer_checks.check_module(self._module, runs_samples_alone=self._runs_samples_alone)
        self._step = self.steps_taken
        loader = self._loader if self._plan is None else None  # `estimated_stepping_batches` may ask for it first
        self._reset_fit()
        self._loader = loader
        super().setup(trainer)
        trainer_checks.check_optimizers(self.optimizers, self._module, self.settings.public_optimizers)
        self._note_unledgered(trainer.global_step)
        if self._restored_plan is None and trainer.global_step == 0:
            self._step = 0
        if self._noise is None:
            seed = self.settings.seed
            self._noise = GaussianNoise(
                seed=None if seed is None else seed * 1_000_003 + self.global_rank, secure=self.settings.secure_rng
            )
        self._engine = make_engine(
            self._module,
            grad_sample=self.settings.grad_sample,
            memory=self.settings.memory,
            microbatch_size=self.settings.microbatch_size,
        )
        self._engine.attach()
        if self.root_device.type == "cpu":
            keep_freed_memory()
        self._refresh_parameters()
        self.mechanisms.check(
            self._clipping, target_epsilon=self.settings.target_epsilon, num_private_optimizers=len(self._sums)
        )
        self._watch_hooks()
        self._logs = TrainingLogs(trainer, self.nonprivate_logs, strict=self.settings.strict_logging)

    @override
    def teardown(self) -> None:
        """Leaves the module and the optimizers as they were."""
        if self._engine is not None:
            self._engine.end()
            self._engine.detach()
            self._engine = None
            give_back_freed_memory()
        for both in self._optimizers_and_wrappers():
            for optimizer in both:
                optimizer.__dict__.pop("zero_grad", None)
        if self.lightning_module is not None:
            self.lightning_module.__dict__.pop("_on_before_batch_transfer", None)
        if self._logs is not None:
            self._logs.detach()
            self._logs = None
        self._sums = {}
        self._stand_in = self._on_device = self._batch = self.budget = self.last_allowed_step = None
        self.mechanisms = Mechanisms()
        self.writes_card = True
        super().teardown()

    def _watch_hooks(self) -> None:
        """Follows ``zero_grad`` of private optimizers, and keeps logical batches from a user's transfer hook."""
        for index, both in enumerate(self._optimizers_and_wrappers()):
            for optimizer in both if index not in self.settings.public_optimizers else ():
                optimizer.__dict__["zero_grad"] = self._forgetting(index, optimizer.zero_grad)
        owners = [self._module, self._trainer.datamodule]  # type: ignore[attr-defined]
        if any(owner is not None and is_overridden("on_before_batch_transfer", owner) for owner in owners):
            self._module.__dict__["_on_before_batch_transfer"] = _sparing_logical_batches(self._module)

    def _optimizers_and_wrappers(self) -> list[tuple[Optimizer, Any]]:
        """Each optimizer with Lightning's wrapper of it, which is what manual optimization hands to the user."""
        return list(zip(self.optimizers, self._lightning_optimizers, strict=True))

    def _forgetting(self, index: int, zero_grad: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(zero_grad)
        def forget(*args: Any, **kwargs: Any) -> None:
            self._unfinished.discard(index)
            if self._recording and index in self._sums:
                self._engine.discard(self._sums[index].names)
            zero_grad(*args, **kwargs)

        return forget

    def _parameters_of(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of one optimizer by qualified name, in the module's order: trainable now, or private in an earlier step.

        The latter are kept because training steps switch ``requires_grad`` off and on within a batch; what is off when its
        optimizer steps gets no gradient.
        """
        own = {id(p) for group in self.optimizers[index].param_groups for p in group["params"]}
        known = self._sums[index].parameters if index in self._sums else {}
        return {
            name: p
            for name, p in self._module.named_parameters()
            if id(p) in own and (p.requires_grad or known.get(name) is p)
        }

    def _refresh_parameters(self) -> None:
        """Follows layers that a callback froze or unfroze since the last step."""
        public: set[str] = set()
        for index in range(len(self.optimizers)):
            parameters = self._parameters_of(index)
            if index in self.settings.public_optimizers:
                public |= parameters.keys()
            elif not parameters:
                self._sums.pop(index, None)
            elif index not in self._sums or not self._sums[index].holds(parameters):
                self._sums[index] = ClippedSum(parameters, self._clipping, self.mechanisms.threshold.num_statistics)
        private = {name for sums in self._sums.values() for name in sums.names}
        recorded = {
            name: p
            for name, p in self._module.named_parameters()
            if name in private or (p.requires_grad and name not in public)
        }
        self._engine.set_parameters(recorded)
        flags = [layer.training for layer in self._module.modules()]
        if flags != self._training_flags:
            trainer_checks.check_module(self._module, runs_samples_alone=self._runs_samples_alone)
            self._training_flags = flags

    @override
    def on_train_start(self) -> None:
        """Builds the plan before the first step, so that a target that cannot be met is an error and not a surprise."""
        _ = self.plan
        self._decided = self.mechanisms.described()
        super().on_train_start()

    @override
    def on_train_end(self) -> None:
        """One line at the end of fit, and the privacy card beside the logger's files."""
        super().on_train_end()
        if self.writes_card:
            card_files.write(self._trainer, self)
        rank_zero_info(statement.summary_line(self.plan, self.ledger, self.accountant))


def _sparing_logical_batches(module: pl.LightningModule) -> Callable[..., Any]:
    """The module's own transfer hook, which the strategy calls a microbatch; Lightning's call a batch passes through."""
    original = module._on_before_batch_transfer

    def on_before_batch_transfer(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, LogicalBatch) else original(batch, dataloader_idx)

    return on_before_batch_transfer
