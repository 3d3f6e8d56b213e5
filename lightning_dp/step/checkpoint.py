"""Writing of ledger and plan to a Lightning checkpoint, and reading with validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.reporting.notes import RunNotes

KEY = "lightning_dp"
VERSION = 1


_KEYS = {"version", "ledger", "plan", "step", "global_step", "unledgered", "notes"}
#: Digest of the weights, where the user saves them apart from the privacy state.
WEIGHTS = "weights"


class Restored(NamedTuple):
    """The privacy state restored from a checkpoint.

    Args:
        ledger: of the resumed run.
        plan: the saved plan, or None.
        step: the logical step to resume from.
        unledgered: optimizer steps from before the run, as of a public checkpoint, which no ledger holds.
    """

    ledger: Ledger
    plan: dict[str, Any] | None
    step: int
    unledgered: int


def dump(
    ledger: Ledger, plan: dict[str, Any] | None, step: int, *, global_step: int, unledgered: int, notes: RunNotes
) -> dict[str, Any]:
    """Return the privacy state as plain values, without the noise generator's state, because reused noise can be
    cancelled.
    """
    return {
        "version": VERSION,
        "ledger": ledger.state_dict(),
        "plan": plan and {name: value for name, value in plan.items() if name != "spent"},  # which ``load`` adds
        "step": step,
        "global_step": global_step,
        "unledgered": unledgered,
        "notes": notes.state_dict(),
    }


def load(checkpoint: dict[str, Any], *, current: Ledger, allow_public: bool, one_step_a_batch: bool) -> Restored:
    """Validate the privacy state of a checkpoint, and return its ledger, plan and logical step.

    Args:
        checkpoint: the loaded Lightning checkpoint.
        current: the strategy's ledger. If it continues the checkpoint's ledger, all of its steps are kept, because a
            learning-rate search restores the weights, but the privacy remains spent.
        allow_public: accept a checkpoint without a ledger as public.
        one_step_a_batch: whether every optimizer step is a logical batch of its own (automatic optimization), so that
            the ledger must hold at least as many.

    Raises:
        PrivacyError: no ledger, a damaged one, one that holds fewer steps than the checkpoint was trained for, one of
            another run, or one of another relation between neighbouring datasets or of another unit.
    """
    state = checkpoint.get(KEY)
    if state is None:
        if allow_public:
            return Restored(current, None, 0, max(0, optimizer_steps(checkpoint) - current.num_steps))
        raise PrivacyError(
            "Expected a checkpoint with a privacy ledger, got one without: it was not written under a private "
            "strategy. If it never saw the private data, pass DPStrategy(allow_public_checkpoint=True); else its "
            "privacy loss is unknown."
        )
    if not isinstance(state, dict) or state.get("version") != VERSION or set(state) - {WEIGHTS} != _KEYS:
        raise PrivacyError(
            f"Expected the privacy state of a checkpoint in version {VERSION}, got {_describe(state)}. The checkpoint "
            "is damaged or of another version of lightning_dp: use an intact one."
        )
    saved = Ledger.from_state_dict(state["ledger"])
    step, unledgered = state["step"], state["unledgered"]
    if not _is_count(step) or step > saved.num_steps:
        raise PrivacyError(
            f"Expected a logical step between 0 and the ledger's {saved.num_steps}, got step={step!r}. The checkpoint "
            "is damaged: use an intact one."
        )
    if not _is_count(unledgered) or state["global_step"] != checkpoint.get("global_step"):
        raise PrivacyError(
            f"Expected the privacy state of global_step={checkpoint.get('global_step')!r}, got one of "
            f"{state['global_step']!r} with unledgered={unledgered!r}. State and weights are not of one moment: use an "
            "intact checkpoint."
        )
    taken = optimizer_steps(checkpoint) - unledgered
    if one_step_a_batch and taken > saved.num_steps:
        raise PrivacyError(
            f"Expected a ledger of at least the {taken} steps that the optimizer has taken, got {saved.num_steps}. "
            "Epsilon would be understated: use an intact checkpoint."
        )
    if saved.neighboring_relation != current.neighboring_relation:
        raise PrivacyError(
            f"Expected neighboring_relation={saved.neighboring_relation!r} as in the checkpoint, got "
            f"{current.neighboring_relation!r}. One epsilon cannot state two relations: pass the checkpoint's."
        )
    if saved.unit != current.unit:
        raise PrivacyError(
            f"Expected a checkpoint of a run that protects each {current.unit}, got one that protects each "
            f"{saved.unit}. One epsilon cannot state two units: pass the unit and records_per_unit of the checkpoint's "
            "run."
        )
    plan = state["plan"]
    if plan is not None and not (isinstance(plan, dict) and "dataset_size" in plan and "noise_multiplier" in plan):
        raise PrivacyError(
            f"Expected the saved plan to be a dictionary, got {_describe(plan)}. The checkpoint is damaged: use an "
            "intact one."
        )
    plan = plan and {**plan, "spent": saved.num_steps}
    if current.num_steps == 0 or current.is_prefix_of(saved):
        return Restored(saved, plan, step, unledgered)
    if saved.is_prefix_of(current):
        if current.num_steps > saved.num_steps:  # steps are taken again, so their records take part once more
            current.start_pass()
        return Restored(current, plan, step, unledgered)
    raise PrivacyError(
        f"Expected a checkpoint of this strategy's own run, got one of another ({saved.num_steps} steps), while the "
        f"strategy already holds {current.num_steps} steps. Pass a fresh DPStrategy to the Trainer that resumes."
    )


def optimizer_steps(checkpoint: Mapping[str, Any]) -> int:
    """Return the largest step count in a checkpoint: Lightning's, or an optimizer's own."""
    states = [state.get("state", {}).values() for state in checkpoint.get("optimizer_states", ())]
    return max([int(checkpoint.get("global_step", 0)), *(most_steps(state) for state in states)])


def most_steps(states: Iterable[Any]) -> int:
    """Return the largest ``step`` in an optimizer's per-parameter states; 0 if it counts no steps."""
    counts = [state["step"] for state in states if isinstance(state, Mapping) and "step" in state]
    return max((int(count) for count in counts if isinstance(count, (int, float, Tensor))), default=0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def load_notes(checkpoint: dict[str, Any]) -> RunNotes:
    """Return the run notes of a checkpoint with a ledger.

    Raises:
        PrivacyError: the notes cannot be read.
    """
    try:
        return RunNotes.from_state_dict(checkpoint[KEY].get("notes", {}))
    except (ValueError, AttributeError) as error:
        raise PrivacyError(
            f"Expected intact notes of the run in the checkpoint, got some that cannot be read: {error}"
        ) from error


def _describe(value: Any) -> str:
    return f"{type(value).__name__} with {sorted(value)}" if isinstance(value, dict) else repr(value)
