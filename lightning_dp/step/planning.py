"""Planning: the frozen plan (steps, delta, noise) from the Trainer's limits and the user's settings."""

from __future__ import annotations

from dataclasses import replace

from lightning_dp import _messages, schedules
from lightning_dp.accounting import calibrate_noise_multiplier
from lightning_dp.errors import PrivacyError
from lightning_dp.run_length import RunLength
from lightning_dp.sampling import SamplingFacts
from lightning_dp.step.correlation import check_resumed, plan_correlation
from lightning_dp.step.facts import StateFacts
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan, default_delta
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState

#: Facts that two plans must share so that a resumed run keeps the noise of the first.
_SAME_RUN = (
    "sampling", "dataset_size", "expected_batch_size", "sample_rate", "steps", "clipping", "delta", "target_epsilon",
    "accountant", "neighboring_relation", "schedule", "correlation",
)  # fmt: skip


def resolve_delta(settings: Settings, facts: SamplingFacts) -> float:
    """Return the delta of the run; warn if it is too large to promise anything."""
    size = facts.dataset_size
    if settings.target_delta is None:
        if size is None:
            raise ValueError(
                "Expected target_delta for a dataset without a length, got target_delta=None. Pass a delta well below "
                "one over the number of records."
            )
        delta = default_delta(size)
        _messages.info(f"target_delta={delta:g}, from 1 / (10 x {size} {facts.unit}s) rounded down to a power of ten.")
        return delta
    if size is not None and settings.target_delta >= 1 / size:
        _messages.warn(
            f"target_delta={settings.target_delta:g} is meaningless for {size} {facts.unit}s: publishing one "
            f"{facts.unit} at random would meet it. Use well below 1/{size} = {1 / size:.1e}, for example "
            f"{default_delta(size):g}."
        )
    return settings.target_delta


def build_plan(
    state: PrivacyState, settings: Settings, facts: SamplingFacts, mechanisms: Mechanisms, length: RunLength
) -> DPPlan:
    """Build the plan, calibrating the noise if a target is given.

    Args:
        state: of the run: what was spent already counts towards the target; a checkpoint's plan is resumed.
        settings: the user's arguments.
        facts: of the private loader.
        mechanisms: requests of callbacks, such as a noise schedule or non-private phases.
        length: planned length of the whole run.

    Raises:
        PrivacyError: the dataset's size differs from the resumed run's.
        ValueError: a target with an unbounded run, a target that cannot be reached, or settings that do not fit the
            data or the mechanisms.
    """
    start, restored = state.steps_taken, state.restored_plan
    if restored is not None and restored["dataset_size"] != facts.dataset_size:
        raise PrivacyError(
            f"Expected the {restored['dataset_size']} {facts.unit}s of the run being resumed, got "
            f"{facts.dataset_size}. Its ledger is for that dataset only: resume on the same training set, or start a "
            "new run."
        )
    if not facts.add_remove_changes_one_batch and settings.neighboring_relation == "add_or_remove_one":
        raise ValueError(
            "Expected neighboring_relation='replace_one' or 'zero_out' for a stream under sampling='shuffle', got "
            "'add_or_remove_one'. One record more in a stream shifts all later batches, so only a record exchanged in "
            "its place changes a single batch: pass one of these, or give the dataset random access."
        )
    mechanisms.begin_run(length)
    asked = settings.noise
    before = restored if state.followed is None else state.followed.state_dict()
    correlation = None if asked is None else plan_correlation(asked, facts, mechanisms, length, before)
    plan = DPPlan(
        sampling=facts.sampling,
        dataset_size=facts.dataset_size,
        expected_batch_size=facts.expected_batch_size,
        sample_rate=facts.sample_rate,
        steps=length.steps,
        steps_per_epoch=length.steps_per_epoch,
        noise_multiplier=0.0 if settings.noise_multiplier is None else float(settings.noise_multiplier),
        clipping=settings.make_clipping(),
        delta=resolve_delta(settings, facts),
        schedule=mechanisms.noise_schedule(length),
        is_private=mechanisms.is_private(length),
        unsound=mechanisms.never_private,
        batches_per_pass=facts.batches_per_pass,
        unit=facts.unit,
        records_per_unit=facts.records_per_unit,
        correlation=correlation,
        target_epsilon=settings.target_epsilon,
        accountant=settings.accountant,
        neighboring_relation=settings.neighboring_relation,
        per_sample_loss=settings.per_sample_loss,
    )
    if settings.target_epsilon is not None:
        plan = replace(plan, noise_multiplier=_calibrated(plan, state))
    elif plan.steps is None or start < plan.steps:
        # an accountant without a bound for such steps would otherwise fail once they are taken
        state.accountant.epsilon(state.ledger.extended(plan.runs(start, start + 1)), plan.delta)
    check_resumed(plan.state_dict(), before, start)
    _check_noise_is_enough(plan, mechanisms, start)
    return plan


def begin_batch(run: StateFacts, *, begins_pass: bool) -> None:
    """Make the plan for the next batch; if passes were cut short, with more noise or fewer steps, as limits require."""
    if begins_pass:
        _begin_pass(run)
    _ = run.plan


def _begin_pass(run: StateFacts) -> None:
    state, plan, step = run.state, run.state.plan, run.steps_taken
    if plan is None or plan.sampling == "poisson" or plan.correlation is not None:
        return
    if step % (plan.steps_per_epoch or 1) == 0:
        return  # as planned
    if plan.target_epsilon is not None and plan.steps is not None and step < plan.steps:
        planned = state.ledger.extended(plan.runs(step, plan.steps))
        if state.accountant.epsilon(planned, plan.delta) > plan.target_epsilon:
            state.plan = None  # the noise is calibrated again
            return
    run.settle_limit()


def _check_noise_is_enough(plan: DPPlan, mechanisms: Mechanisms, start: int) -> None:
    """Refuse, before the first step, a statistic with too little noise for any step of the schedule."""
    stop = start + 1 if plan.steps is None else plan.steps
    factors = [factor for factor, _ in schedules.runs(plan.schedule, start, max(start, stop))]
    if factors:
        mechanisms.bound.share_noise(plan.noise_multiplier * max(factors), plan.expected_batch_size)


def _calibrated(plan: DPPlan, state: PrivacyState) -> float:
    start, stop, ledger, restored = state.steps_taken, plan.steps, state.ledger, state.restored_plan
    if stop is None:
        raise ValueError(
            "Expected a known number of steps with target_epsilon, got a stream without a length and no max_steps. "
            "The noise is calibrated over all planned steps: set `Trainer(max_steps=...)`, give the dataset a length, "
            "or pass noise_multiplier."
        )
    assert plan.target_epsilon is not None
    now = plan.state_dict()
    if (
        restored is not None
        and restored["spent"] == ledger.num_steps
        and all(restored.get(k) == now[k] for k in _SAME_RUN)
    ):
        kept = float(restored["noise_multiplier"])
        # a resume within a shuffled pass costs one more pass than planned
        if state.accountant.epsilon(ledger.extended(plan.runs(start, stop, kept)), plan.delta) <= plan.target_epsilon:
            return kept
    if start >= stop:
        return 1.0  # nothing is left to run: the strategy refuses any further step
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=plan.target_epsilon,
        delta=plan.delta,
        accountant=state.accountant,
        runs=lambda sigma: plan.runs(start, stop, sigma),
        history=ledger,
    )
    _messages.info(
        f"noise_multiplier={noise_multiplier:.4g}, calibrated to epsilon <= {plan.target_epsilon:g} at "
        f"delta={plan.delta:g} over {stop - start} steps ({plan.accountant})."
    )
    return noise_multiplier
