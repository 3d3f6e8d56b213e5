"""Ledger and plan in a Lightning checkpoint: what is written, what is accepted back."""

from __future__ import annotations

from typing import Any

from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.plan import DPPlan

KEY = "lightning_dp"
VERSION = 1


def dump(ledger: Ledger, plan: DPPlan | None, step: int) -> dict[str, Any]:
    """The privacy state as plain values. The noise generator's state is never part of it: noise used twice cancels out."""
    return {
        "version": VERSION,
        "ledger": ledger.state_dict(),
        "plan": None if plan is None else plan.state_dict(),
        "step": step,
    }


def load(
    checkpoint: dict[str, Any], *, current: Ledger, allow_public: bool
) -> tuple[Ledger, dict[str, Any] | None, int]:
    """Reads ledger, plan and logical step from a checkpoint.

    Args:
        checkpoint: the loaded Lightning checkpoint.
        current: the strategy's ledger; steps it holds beyond the checkpoint's are kept (a learning-rate search restores the
            weights, not the data).
        allow_public: accept a checkpoint without a ledger as public.

    Returns:
        The ledger to go on with, the saved plan, and the logical step to go on from.

    Raises:
        PrivacyError: no ledger, a damaged one, one of another run, or another relation between neighbouring datasets.
    """
    state = checkpoint.get(KEY)
    if state is None:
        if allow_public:
            return current, None, 0
        raise PrivacyError(
            "Expected a checkpoint with a privacy ledger, got one without: it was not written under a private strategy. If it never "
            "saw the private data, pass DPStrategy(allow_public_checkpoint=True); else its privacy loss is unknown."
        )
    if not isinstance(state, dict) or state.get("version") != VERSION or not {"ledger", "plan", "step"} <= state.keys():
        raise PrivacyError(
            f"Expected the privacy state of a checkpoint in version {VERSION}, got {_describe(state)}. The checkpoint is damaged or "
            "of another version of lightning_dp: use an intact one."
        )
    saved = Ledger.from_state_dict(state["ledger"])
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= saved.num_steps:
        raise PrivacyError(
            f"Expected a logical step between 0 and the ledger's {saved.num_steps}, got step={step!r}. The checkpoint is damaged: "
            "use an intact one."
        )
    if saved.neighboring_relation != current.neighboring_relation:
        raise PrivacyError(
            f"Expected neighboring_relation={saved.neighboring_relation!r} as in the checkpoint, got "
            f"{current.neighboring_relation!r}. One epsilon cannot speak of two relations: pass the checkpoint's."
        )
    plan = state["plan"]
    if plan is not None and not (isinstance(plan, dict) and "dataset_size" in plan and "noise_multiplier" in plan):
        raise PrivacyError(
            f"Expected the saved plan to be a dictionary, got {_describe(plan)}. The checkpoint is damaged: use an intact one."
        )
    plan = plan and {**plan, "spent": saved.num_steps}
    if current.num_steps == 0 or current.is_prefix_of(saved):
        return saved, plan, step
    if saved.is_prefix_of(current):
        return current, plan, step
    raise PrivacyError(
        f"Expected a checkpoint of this strategy's own run, got one of another ({saved.num_steps} steps), while the strategy already "
        f"holds {current.num_steps} steps. Pass a fresh DPStrategy to the Trainer that resumes."
    )


def _describe(value: Any) -> str:
    return f"{type(value).__name__} with {sorted(value)}" if isinstance(value, dict) else repr(value)
