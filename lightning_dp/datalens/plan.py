"""The public settings of a DataLens run, and their cost in epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lightning_dp.accounting import Accountant, Ledger, PrivacyEvent, calibrate_noise_multiplier, gaussian_epsilon
from lightning_dp.step.plan import Run

#: Facts that two plans must share so that a resumed run keeps the noise of the first.
_SAME_RUN = ("dataset_size", "num_teachers", "top_k", "batch_size", "steps", "delta", "target_epsilon", "accountant")


def sensitivity(top_k: int, batch_size: int) -> float:
    """Return the L2 sensitivity of one step's vote sums to replacing one record: ``2 sqrt(k B)``.

    A record is in one shard, which one teacher sees. Before and after the replacement, that teacher's vote on each of
    the B generated samples has norm at most ``sqrt(k)``.

    Example:
        >>> sensitivity(top_k=4, batch_size=1)
        4.0
    """
    return 2 * math.sqrt(top_k * batch_size)


def epsilon_after(steps: int, *, sigma: float, top_k: int, batch_size: int, delta: float) -> float:
    """Return the exact epsilon after a number of steps, without training.

        mu^2 = steps x 4 k B / sigma^2,  epsilon from ``gaussian_epsilon(mu, delta)``

    Args:
        steps: steps of the generator, >= 0.
        sigma: standard deviation of the noise on each sum of votes, > 0.
        top_k: k, votes of one teacher on one generated sample.
        batch_size: B, generated samples per step.
        delta: in (0, 1).

    Returns:
        Epsilon under replacing one record. Public.

    Example:
        >>> round(epsilon_after(86, sigma=5000.0, top_k=200, batch_size=15, delta=1e-5), 3)
        0.738
    """
    return gaussian_epsilon(math.sqrt(steps) * sensitivity(top_k, batch_size) / sigma, delta)


@dataclass(frozen=True, kw_only=True)
class DataLensPlan:
    """The public settings of one DataLens run.

    A step releases the sums of all teachers' votes on B generated samples, ``s = sum_i v_i + N(0, noise_std^2 I)``: one
    Gaussian release of sensitivity ``2 sqrt(k B)``, the same as B releases of sensitivity ``2 sqrt(k)``.

    **Guarantee**: every field is public knowledge; none depends on a record, a vote or a generator's state.

    Args:
        dataset_size: number of records n.
        num_teachers: number of shards N.
        top_k: k, votes of one teacher on one generated sample.
        batch_size: B, generated samples per step.
        noise_std: standard deviation of the noise on each sum of votes; 0 means epsilon is infinite.
        threshold: beta, fraction of the teachers that a noisy sum must exceed.
        steps: steps of the whole run, counted from its start; None if nothing bounds it.
        delta: the delta at which epsilon is stated.
        target_epsilon: epsilon that ``noise_std`` is calibrated to, or None.
        accountant: name of the accountant.

    Example:
        >>> plan = DataLensPlan(dataset_size=10_000, num_teachers=500, top_k=1, batch_size=4, noise_std=8.0,
        ...                     threshold=0.2, steps=100, delta=1e-6)
        >>> plan.event(0)
        PrivacyEvent(kind='gaussian', noise_multiplier=2.0, sample_rate=1.0, reason='', num_batches=1)
    """

    dataset_size: int
    num_teachers: int
    top_k: int
    batch_size: int
    noise_std: float
    threshold: float
    steps: int | None
    delta: float
    target_epsilon: float | None = None
    accountant: str = "gdp"
    neighboring_relation: str = "replace_one"

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise divided by the sensitivity of one step."""
        return self.noise_std / sensitivity(self.top_k, self.batch_size)

    @property
    def shard_size(self) -> int:
        """Number of records per teacher."""
        return self.dataset_size // self.num_teachers

    def sigma(self, step: int) -> float:
        """Return the noise multiplier of a step, the same for all steps."""
        return self.noise_multiplier

    def event(self, step: int) -> PrivacyEvent:
        """Return the privacy event of a step: a Gaussian release without sampling."""
        return PrivacyEvent.gaussian(noise_multiplier=self.sigma(step))

    def runs(self, start: int, stop: int) -> list[Run]:
        """Return the privacy events of the steps ``start <= t < stop``, as pairs (event, number of steps)."""
        return [(self.event(start), stop - start)] if stop > start else []

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for a checkpoint and for comparison on resume."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "noise_multiplier": self.noise_multiplier}

    def calibrated(
        self, *, start: int, ledger: Ledger, accountant: Accountant, restored: dict[str, Any] | None = None
    ) -> DataLensPlan:
        """Return the plan with the least noise that keeps the whole run within ``target_epsilon``, if one is set.

        Args:
            start: step at which this fit begins (above 0 after a resume).
            ledger: releases so far, which count towards the target.
            accountant: computes epsilon.
            restored: plan in the checkpoint being resumed; if it describes the same run, its noise is used.

        Raises:
            ValueError: the run is unbounded, or no noise reaches the target.
        """
        if self.target_epsilon is None:
            return self
        if self.steps is None:
            raise ValueError(
                "Expected a known number of steps with target_epsilon, got an unbounded run. The noise is calibrated "
                "over all planned steps: set `Trainer(max_steps=...)` or max_epochs, or pass sigma."
            )
        now = self.state_dict()
        if restored is not None and restored["spent"] == ledger.num_steps and _same(restored, now):
            return replace(self, noise_std=float(restored["noise_std"]))
        remaining = self.steps - start
        if remaining <= 0:
            return replace(self, noise_std=1.0)  # nothing is left to run, so no noise will be drawn
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            accountant=accountant,
            runs=lambda sigma: [(PrivacyEvent.gaussian(noise_multiplier=sigma), remaining)],
            history=ledger,
        )
        return replace(self, noise_std=noise_multiplier * sensitivity(self.top_k, self.batch_size))


def _same(restored: dict[str, Any], now: dict[str, Any]) -> bool:
    return all(restored.get(key) == now[key] for key in _SAME_RUN)
