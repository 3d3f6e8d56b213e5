"""Deliberately broken builds: how each is made out of the sound one, and what catches it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.auditing import checks, user_code
from tests.auditing.broken_builds import (
    allocation_by_the_closed_form,
    checkpoints_unread,
    clipping_after_summing,
    coins_in_the_middle,
    correlated_ranks,
    divisor_by_realised_batch,
    figures_unread,
    hooks_not_run,
    items_read_once,
    ledger_not_written,
    mask_redrawn_within_a_batch,
    microbatches_with_effect,
    no_clipping,
    no_record_out_of_range,
    noise_on_the_first_microbatch_only,
    norms_of_another_draw,
    norms_without_rounding,
    optimizers_unguarded,
    reshuffled_order,
    same_noise_every_step,
    scaled_noise,
    small_batches_on_trial,
    state_unchecked,
    steps_not_rehearsed,
    streams_go_on,
    user_split_over_microbatches,
)

Check = Callable[[Path], None]


@dataclass(frozen=True)
class Variant:
    """A broken build.

    Args:
        breaks: makes it out of the sound one.
        check: raises AssertionError on it.
        says: what the error must contain (a regular expression).
    """

    breaks: Callable[[pytest.MonkeyPatch], None]
    check: Check
    says: str


AUDIT, ABOVE = checks.check_the_audit_stays_below_the_claim, "is above the claim"

VARIANTS: dict[str, Variant] = {
    "no_noise": Variant(scaled_noise(0.0), AUDIT, ABOVE),
    "half_the_noise": Variant(scaled_noise(0.5), AUDIT, ABOVE),
    "two_thirds_of_the_noise": Variant(scaled_noise(2 / 3), AUDIT, ABOVE),
    "three_halves_of_the_noise": Variant(
        scaled_noise(3 / 2), checks.check_every_coordinate_carries_its_noise, "times its std"
    ),
    "no_clipping": Variant(no_clipping, AUDIT, ABOVE),
    "clipping_after_summing": Variant(
        clipping_after_summing,
        checks.check_one_record_moves_the_sum_by_at_most_the_bound,
        "one record moves the sum by",
    ),
    "user_split_over_microbatches": Variant(
        user_split_over_microbatches,
        checks.check_one_user_moves_the_sum_by_at_most_the_bound,
        "one user moves the sum by",
    ),
    "divisor_by_realised_batch": Variant(
        divisor_by_realised_batch, checks.check_the_divisor_is_the_expected_batch_size, "the noisy sum was divided by"
    ),
    "mask_redrawn_within_a_batch": Variant(
        mask_redrawn_within_a_batch,
        checks.check_one_mask_holds_for_a_logical_batch,
        "the mask changed within a logical batch",
    ),
    "noise_on_the_first_microbatch_only": Variant(noise_on_the_first_microbatch_only, AUDIT, ABOVE),
    "noise_once_a_rank": Variant(
        scaled_noise(math.sqrt(2)), checks.check_noise_shares_of_ranks_add_up, r"the noise has 1\.[345].* times its std"
    ),
    "same_noise_every_step": Variant(
        same_noise_every_step, checks.check_noise_is_new_at_every_step, "noise of two steps has correlation 1"
    ),
    "correlated_ranks": Variant(
        correlated_ranks, checks.check_ranks_draw_independently, "two ranks drew the same positions"
    ),
    "reshuffled_order": Variant(
        reshuffled_order,
        checks.check_records_come_back_as_the_noise_accounts_for,
        "a record has sensitivity",
    ),
    "allocation_by_the_closed_form": Variant(
        allocation_by_the_closed_form,
        checks.check_shuffled_passes_cost_what_they_spend,
        "at the claimed epsilon drawn passes have delta",
    ),
    "ledger_not_written": Variant(
        ledger_not_written, checks.check_every_release_is_in_the_ledger, "the ledger holds 0 of 8 releases"
    ),
    "norms_without_rounding": Variant(
        norms_without_rounding,
        user_code.check_cancelling_positions_stay_within_the_bound,
        "one cancelling record moves the sum by",
    ),
    "optimizers_unguarded": Variant(
        optimizers_unguarded, user_code.check_no_raw_step_goes_through, "an optimizer stepped by itself was accepted"
    ),
    "microbatches_with_effect": Variant(
        microbatches_with_effect, user_code.check_side_effects_happen_once, "a batch of .* samples moved the counter by"
    ),
    "state_unchecked": Variant(
        state_unchecked, user_code.check_state_from_records_is_refused, "state written from records was accepted"
    ),
    "hooks_not_run": Variant(
        hooks_not_run, user_code.check_state_from_hooks_is_refused, "state written in a hook was accepted"
    ),
    "steps_not_rehearsed": Variant(
        steps_not_rehearsed,
        user_code.check_steps_that_read_the_batch_are_refused,
        "an optimizer step that reads the batch was accepted",
    ),
    "items_read_once": Variant(
        items_read_once, user_code.check_items_that_share_memory_are_refused, "a dataset with one buffer was accepted"
    ),
    "checkpoints_unread": Variant(
        checkpoints_unread, user_code.check_checkpoints_of_records_are_refused, "a record in a checkpoint was accepted"
    ),
    "figures_unread": Variant(
        figures_unread, user_code.check_figures_that_come_back_are_refused, "a loss scaled by a logged one was accepted"
    ),
    "coins_in_the_middle": Variant(
        coins_in_the_middle, user_code.check_rare_coins_are_refused, "a coin that mixes the batch was accepted"
    ),
    "small_batches_on_trial": Variant(
        small_batches_on_trial,
        user_code.check_couplings_of_real_batches_are_refused,
        "a choice of hard examples was accepted",
    ),
    "no_record_out_of_range": Variant(
        no_record_out_of_range, user_code.check_refilled_records_are_refused, "a copy of one record .* was accepted"
    ),
    "norms_of_another_draw": Variant(
        norms_of_another_draw, user_code.check_norm_and_sum_see_the_same_draws, "a record moves the sum by"
    ),
    "streams_go_on": Variant(
        streams_go_on, user_code.check_draws_are_free_of_earlier_batches, "draws of user code follow from its seed"
    ),
}

CHECKS: list[Check] = sorted({variant.check for variant in VARIANTS.values()}, key=lambda check: check.__name__)
