"""PrivacyState: the privacy that a run has spent and may still spend; saved in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from multiprocessing.context import get_spawning_popen
from typing import Any

from torch import nn
from typing_extensions import Self

from lightning_dp.accounting import Accountant, Ledger, make_accountant
from lightning_dp.errors import PrivacyError
from lightning_dp.reporting import statement
from lightning_dp.reporting.notes import RunNotes
from lightning_dp.step import checkpoint as saved
from lightning_dp.step.earlier_runs import EarlierRuns
from lightning_dp.step.history import History, apart, read_history
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.settings import Settings

_ALONE = "by construction, one sample runs at a time"
_UNFOLLOWED = f"{_ALONE}, since no rule follows the module's operations"
_SUMMED = "the loss of a batch taken for the sum of its records' losses, as a comparison showed"


class PrivacyState:
    """Ledger, accountant, plan and position of a private run.

    It outlives a call of fit: the ledger never loses a step, and a later fit continues the ledger.

    **Guarantee**: holds public values only. An entry is written before anything that it pays for is released; releases
    on one logical batch are one entry of their combined precision ``sum_k sigma_k^-2``.

    Args:
        neighboring_relation: relation of the ledger.
        accountant: computes epsilon.
        unit: protected unit of the ledger, "record" or "user".
        seeded: whether sampling and noise follow from a seed that the user gave.
        secure: whether the noise comes from a cryptographic generator.
    """

    def __init__(
        self, neighboring_relation: str, accountant: Accountant, *, seeded: bool, secure: bool, unit: str = "record"
    ) -> None:
        self.ledger = Ledger(neighboring_relation, unit)
        self.accountant = accountant
        self.plan: Any = None
        self.followed: DPPlan | None = None  # in the last step that this process has released
        self.restored_plan: dict[str, Any] | None = None
        self.step = 0
        self.precision = 0.0
        self.unledgered = 0
        self.last_allowed_step = math.inf
        self.nonprivate_logs: set[str] = set()
        self.audits: list[str] = []
        self.choices: set[str] = set()
        self.checked_steps: list[int] = []
        self._kept_apart: list[str] = []
        self.decided: tuple[str, ...] = ()
        self._seeded, self._secure, self.stated_reduction = seeded, secure, "auto"
        self._earlier, self._own_steps = EarlierRuns(), False

    @classmethod
    def of(cls, settings: Settings, history: History = None) -> Self:
        """Return the state of a new run, which has spent what earlier runs on the same data have."""
        state = cls(
            settings.neighboring_relation,
            make_accountant(settings.accountant),
            unit=settings.protects,
            seeded=settings.seed is not None,
            secure=settings.secure_rng,
        )
        state.stated_reduction = settings.loss_reduction
        if history is not None:
            state.begin_after(read_history(history))
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_spawned": get_spawning_popen() is not None}

    def __setstate__(self, held: dict[str, Any]) -> None:
        spawned = held.pop("_spawned")
        vars(self).update(held)
        if not spawned:  # a copy, or a pickle that may be read twice, takes steps of its own
            self.ledger = apart(self.ledger)

    # ---------------------------------------------------------------- earlier runs

    def begin_after(self, ledgers: list[Ledger]) -> None:
        """Add the privacy spent by earlier runs on the same data to the ledger, before the first step of this run.

        Args:
            ledgers: ledgers of the earlier runs; an empty list states that they share no record with this run.
        """
        self.ledger = self._earlier.begin_after(ledgers, self.ledger)

    def count_earlier_runs(self, module: nn.Module) -> None:
        """Add what earlier private runs spent on a module's parameters, before noise is calibrated; see EarlierRuns."""
        self.ledger = self._earlier.count(module, self.ledger)

    def check_history(self, module: nn.Module) -> None:
        """Check that the ledger counts earlier private runs on a module's parameters."""
        self._earlier.check(module, self.ledger)

    # ---------------------------------------------------------------- what has been spent

    @property
    def steps_taken(self) -> int:
        """Number of logical steps of this run that have released noise; schedules are functions of it."""
        return self.step + (self.precision > 0)

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, public; raise ValueError before the first step.

        Args:
            delta: in (0, 1); default: the plan's, or that of the checkpoint being resumed.
        """
        if self.ledger.num_steps == 0:
            raise ValueError(
                "Expected at least one private step, got no steps recorded. Ask for epsilon once training has begun."
            )
        if delta is None:
            delta = self.restored_plan["delta"] if self.plan is None and self.restored_plan else self.plan.delta
        return self.accountant.epsilon(self.ledger, delta)

    def privacy_statement(self) -> str:
        """Return the privacy statement in a few lines; call it once the plan is known."""
        return statement.privacy_statement(self.plan, self.ledger, self.accountant, self.notes)

    @property
    def kept_apart(self) -> list[str]:
        """Reasons for treating samples as independent of each other, one entry per reason."""
        steps = [str(step + 1) for step in dict.fromkeys(self.checked_steps)]
        listed = f"step{'s' * (len(steps) > 1)} {', '.join(steps)}"
        checked = [f"checked on a few records before {listed}"] if steps else []
        return list(dict.fromkeys([*self._kept_apart, *checked]))

    def note_kept_apart(self, why: str) -> None:
        """Record a reason, other than checks, for treating samples as independent of each other."""
        self._kept_apart = list(dict.fromkeys([*self._kept_apart, why]))

    @property
    def runs_alone(self) -> bool:
        """True if samples run one at a time since no rule could follow the module, in this run or before its resume."""
        return _UNFOLLOWED in self._kept_apart

    def note_alone(self, *, chosen: bool) -> None:
        """Take note that one sample runs at a time, as the user chose, or since no rule could follow the module."""
        self.note_kept_apart(_ALONE if chosen else _UNFOLLOWED)

    @property
    def loss_reduction(self) -> str:
        """Way in which a scalar loss combines the samples: "mean" or "sum", as given or as found, resumed or not."""
        found = "sum" if _SUMMED in self._kept_apart else "mean"
        return found if self.stated_reduction == "auto" else self.stated_reduction

    def note_sum(self, *, found: bool) -> None:
        """Take note that a loss whose reduction was not given is a sum over the batch, or drop this note."""
        self._kept_apart = [why for why in self._kept_apart if why != _SUMMED] + [_SUMMED] * found

    def summary_line(self) -> str:
        """Return the line that reports, at the end of a fit, the privacy spent."""
        return statement.summary_line(self.plan, self.ledger, self.accountant)

    # ---------------------------------------------------------------- one logical step

    def begin_step(self) -> None:
        """Begin the next logical step; a step that has released nothing is begun again."""
        self.step, self.precision = self.steps_taken, 0.0

    def record(self, sigma: float) -> None:
        """Write one release of the current logical step, with noise multiplier ``sigma``, into the ledger.

        The first release of a step makes an entry; further ones add their precision to it.

        Raises:
            PrivacyError: the releases of this step cost more than planned, while an epsilon was promised or noise is
                correlated.
        """
        plan: DPPlan = self.plan
        first, planned = self.precision == 0.0, plan.sigma(self.step)
        precision = self.precision + (sigma**-2 if sigma > 0 else math.inf)
        combined = precision**-0.5
        limited = plan.target_epsilon is not None or math.isfinite(self.last_allowed_step)
        if combined < planned * (1 - 1e-9) and (limited or plan.correlation is not None):
            raise PrivacyError(
                "Expected each private optimizer to step once per batch under target_epsilon, PrivacyBudget or "
                "correlated noise, got a further step on the same batch. It costs privacy that was not planned for: "
                "step once, or pass noise_multiplier, no budget and independent noise."
            )
        self.precision = precision
        spent = planned if math.isclose(combined, planned, rel_tol=1e-9) else combined
        self._own_steps, self.followed = True, plan
        (self.ledger.record if first else self.ledger.amend_last)(plan.event_of(spent, self.step))

    def check_budget(self) -> None:
        """Check that one more release is planned and affordable.

        Raises:
            PrivacyError: all steps of a calibrated plan, or all steps within a budget, have been taken.
        """
        plan: DPPlan = self.plan
        if plan.target_epsilon is not None and plan.steps is not None and self.step >= plan.steps:
            raise PrivacyError(
                f"Expected at most the {plan.steps} planned steps under target_epsilon={plan.target_epsilon:g}, got "
                "one more. The noise was calibrated to these: set max_epochs or max_steps before fit, not during it."
            )
        if self.precision == 0.0 and self.step >= self.last_allowed_step:
            raise PrivacyError(
                f"Expected to stop after {self.last_allowed_step} steps, where the privacy budget ends, got one more. "
                "Something kept the Trainer going (min_epochs or min_steps?): lower it, or raise the budget."
            )

    # ---------------------------------------------------------------- across processes and checkpoints

    @property
    def notes(self) -> RunNotes:
        """Facts of the run for the privacy card, in addition to plan and ledger."""
        return RunNotes(
            seeded=self._seeded,
            secure_rng=self._secure,
            nonprivate_logs=tuple(sorted(self.nonprivate_logs)),
            mechanisms=self.decided,
            audits=tuple(self.audits),
            choices=tuple(sorted(self.choices)),
            kept_apart=tuple(self.kept_apart),
        )

    def take_notes(self, notes: RunNotes) -> None:
        """Merge the notes of a resumed run, or of another process, into the notes of this run."""
        self._seeded |= notes.seeded
        self._secure &= notes.secure_rng
        self.nonprivate_logs |= set(notes.nonprivate_logs)
        self.audits = list(dict.fromkeys([*notes.audits, *self.audits]))
        self.choices |= set(notes.choices)
        self._kept_apart = list(dict.fromkeys([*notes.kept_apart, *self._kept_apart]))
        self.decided = notes.mechanisms

    def note_unledgered(self, global_step: int, optimizer_states: Iterable[Iterable[Any]]) -> None:
        """Record optimizer steps from before this run, which appear in later checkpoints but in no ledger.

        Args:
            global_step: the Trainer's count.
            optimizer_states: per optimizer, the states of its parameters.
        """
        before = max([global_step, *(saved.most_steps(states) for states in optimizer_states)])
        self.unledgered = max(self.unledgered, before - self.ledger.num_steps)

    def handover(self) -> tuple[Any, ...]:
        """Return the state from which the parent process continues."""
        return self.ledger.state_dict(), self.plan, self.steps_taken, self.unledgered, self.notes

    def take_over(self, handed: tuple[Any, ...]) -> None:
        """Continue from the state of another process."""
        ledger, self.plan, self.step, self.unledgered, notes = handed
        self.followed = self.plan
        self.ledger = Ledger.from_state_dict(ledger)
        self.take_notes(notes)

    def state_dict(self, *, global_step: int) -> dict[str, Any]:
        """Return the state as plain values for a checkpoint; no generator's state is part of it.

        Args:
            global_step: the Trainer's count, compared when the checkpoint is read.
        """
        return saved.dump(
            self.ledger,
            self.plan.state_dict() if self.plan is not None else self.restored_plan,
            self.steps_taken,
            global_step=global_step,
            unledgered=self.unledgered,
            notes=self.notes,
        )

    def load(self, checkpoint: dict[str, Any], *, allow_public: bool, one_step_a_batch: bool) -> None:
        """Resume the run that wrote a checkpoint.

        Args:
            checkpoint: as loaded.
            allow_public: accept a checkpoint without a ledger as trained on public data.
            one_step_a_batch: whether every optimizer step is a logical batch of its own.

        Raises:
            PrivacyError: no ledger, a damaged one, one that is too short, or one of another run.
        """
        fresh = self._earlier.counted and not self._own_steps
        current = Ledger(self.ledger.neighboring_relation, self.ledger.unit) if fresh else self.ledger
        found = saved.load(checkpoint, current=current, allow_public=allow_public, one_step_a_batch=one_step_a_batch)
        if fresh:
            self._earlier.check_beginning(self.ledger, found.ledger)
        notes = saved.load_notes(checkpoint) if saved.KEY in checkpoint else None
        ledger, self.restored_plan, self.step, self.unledgered = found
        self.ledger = ledger if ledger is current else ledger.resumed()
        self.plan, self.followed, self.precision = None, None, 0.0  # steps that are taken again were not planned for
        if notes is not None:
            self.take_notes(notes)
