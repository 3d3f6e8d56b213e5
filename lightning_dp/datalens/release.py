"""The release of the teachers' votes: budget check, ledger entry, noise, sum over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lightning_dp.accounting import Accountant, Ledger
from lightning_dp.datalens.plan import DataLensPlan
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import GaussianNoise


class VoteRelease:
    """The release of the noisy sums of the teachers' votes, each recorded in the ledger first.

        s = sum_i v_i + N(0, noise_std^2 I)

    **Guarantee**: every coordinate gets noise, also those that no teacher voted on. With W ranks, each rank adds 1/W of
    the variance to its own teachers' sum, and then the sums are added up, so the total has the noise exactly once. The
    entry is in the ledger before any noise is drawn. If a budget forbids the release, an error is raised before both.

    Args:
        world_size: number of ranks W.
        seed: for tests only, see ``GaussianNoise``.
        secure: draw the noise from a cryptographic generator.
    """

    def __init__(self, *, world_size: int = 1, seed: int | None = None, secure: bool = False) -> None:
        self.world_size = world_size
        self._noise = GaussianNoise(seed=seed, secure=secure)

    def __call__(
        self,
        sums: Tensor,
        *,
        plan: DataLensPlan,
        ledger: Ledger,
        accountant: Accountant,
        step: int,
        last_allowed_step: float = math.inf,
        sum_over_ranks: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Record the release of one step's votes in the ledger, and add noise to their sums in place.

        Args:
            sums: sum of the votes of this rank's teachers, shape (B, D), float32, contiguous; changed in place.
            plan: the public settings.
            ledger: records the release.
            accountant: computes epsilon after this step.
            step: number of the step in this run.
            last_allowed_step: number of steps that a budget allows; infinite without a budget.
            sum_over_ranks: adds up the ranks' tensors in place.

        Returns:
            The same tensor, now noisy and safe to publish.

        Raises:
            PrivacyError: the step would exceed a budget or the target; nothing is drawn or recorded.
        """
        assert sums.shape[0] == plan.batch_size, "the ledger states exactly this many generated samples"
        refuse_over_budget(plan, ledger, accountant, step=step, last_allowed_step=last_allowed_step)
        ledger.record(plan.event(step))
        self._noise.add_(sums, plan.noise_std / math.sqrt(self.world_size))
        if sum_over_ranks is not None:
            sum_over_ranks(sums)
        return sums

    def close(self) -> None:
        """End the threads that draw the noise; a later release starts new ones."""
        self._noise.close()


def refuse_over_budget(
    plan: DataLensPlan, ledger: Ledger, accountant: Accountant, *, step: int, last_allowed_step: float
) -> None:
    """Raise PrivacyError if one more step is not allowed, or if it would raise epsilon above the plan's target."""
    if step >= last_allowed_step:
        raise PrivacyError(
            f"Expected to stop after {last_allowed_step} steps, where the privacy budget ends, got one more. Something "
            "kept the Trainer going (min_epochs or min_steps?): lower it, or raise the budget."
        )
    if plan.target_epsilon is None:
        return
    epsilon = accountant.epsilon(ledger.extended(plan.runs(step, step + 1)), plan.delta)
    if not epsilon <= plan.target_epsilon:
        raise PrivacyError(
            f"Expected epsilon <= {plan.target_epsilon:g} after this step, got epsilon={epsilon:.6g}. The noise was "
            f"chosen for {plan.steps} steps: plan more before training begins, or raise target_epsilon."
        )
