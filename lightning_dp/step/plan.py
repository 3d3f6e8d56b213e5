"""The frozen public settings of a run, which determine sampler, clipping, noise and ledger entries."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from lightning_dp import schedules
from lightning_dp.accounting import PrivacyEvent
from lightning_dp.clipping import Clipping
from lightning_dp.step.correlation import Correlation

Schedule = Callable[[int], float]
Run = tuple[PrivacyEvent, int] | tuple[PrivacyEvent, int, int]

_UNSAVED = ("steps_per_epoch", "is_private", "unsound")  # fields of a plan that no checkpoint holds
#: Sensitivity of the clipped sum in units of what one sample can add, for each relation between neighbouring datasets.
SENSITIVITY_FACTOR = {"add_or_remove_one": 1.0, "zero_out": 1.0, "replace_one": 2.0}


@functools.lru_cache(64)  # asked for twice in each step
def _poisson(sigma: float, sample_rate: float) -> PrivacyEvent:
    return PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=sample_rate)


def every_step(step: int) -> bool:
    """Return True: every step is private. This default means "never plain SGD"."""
    return True


def default_delta(dataset_size: int) -> float:
    """Return ``1 / (10 n)``, rounded down to a power of ten.

    Example:
        >>> default_delta(60_000)
        1e-06
    """
    exponent = math.floor(-math.log10(10 * dataset_size) + 1e-9)
    return float(f"1e{exponent}")


@dataclass(frozen=True, kw_only=True)
class DPPlan:
    """All public facts of one private training run.

    A logical step ``t`` releases ``sum_i factor_i g_i + N(0, (sigma_t S)^2)`` with
    ``sigma_t = noise_multiplier * schedule(t)`` and ``S`` the sensitivity of the clipped sum.

    **Guarantee**: every field is public knowledge; no value here depends on a batch, a norm or a generator's state.

    Args:
        sampling: "poisson", "shuffle" or "cyclic".
        dataset_size: number of units n, or None for a stream of unknown length (under "shuffle").
        expected_batch_size: B, the divisor of the noisy sum.
        sample_rate: q = B / n under "poisson"; None under "shuffle" and "cyclic".
        steps: logical steps of the whole run, counted from its start; None when nothing bounds it.
        steps_per_epoch: logical steps of one epoch; None when unknown.
        noise_multiplier: sigma_0, noise std over sensitivity before the schedule; 0 means epsilon is infinite.
        schedule: logical step -> factor on sigma.
        clipping: how one sample's gradient is bounded.
        delta: the delta at which epsilon is stated.
        target_epsilon: epsilon to which ``noise_multiplier`` was calibrated, or None.
        accountant: name of the accountant.
        neighboring_relation: "add_or_remove_one", "replace_one" or "zero_out".
        is_private: logical step -> whether it is private; else it is plain SGD, without bound and noise.
        unsound: reason why no step of the run has a finite epsilon, whatever its noise; empty if steps have one.
        batches_per_pass: t, the logical batches of a whole pass, if the sampler puts each unit into exactly one of
            them, drawn uniformly and independently; else None. A run may use fewer of them per pass
            (``steps_per_epoch``).
        unit: "record" or "user": the protected unit, which n, q and B count.
        records_per_unit: most records that a user brings to a logical batch; None for records.
        correlation: of the noise between steps; None if it is independent.
        per_sample_loss: whether each record's own loss counts, computed on that record alone, instead of the batch's
            loss.

    Example:
        >>> from lightning_dp.clipping import FlatClipping
        >>> plan = DPPlan(sampling="poisson", dataset_size=1000, expected_batch_size=100, sample_rate=0.1, steps=20,
        ...               steps_per_epoch=10, noise_multiplier=2.0, clipping=FlatClipping(1.0), delta=1e-5)
        >>> plan.event(0).noise_multiplier
        2.0
    """

    sampling: str
    dataset_size: int | None
    expected_batch_size: int
    sample_rate: float | None
    steps: int | None
    steps_per_epoch: int | None
    noise_multiplier: float
    clipping: Clipping
    delta: float
    schedule: Schedule = field(default_factory=schedules.constant)
    target_epsilon: float | None = None
    accountant: str = "pld"
    neighboring_relation: str = "add_or_remove_one"
    is_private: Callable[[int], bool] = every_step
    unsound: str = ""
    batches_per_pass: int | None = None
    unit: str = "record"
    records_per_unit: int | None = None
    correlation: Correlation | None = None
    per_sample_loss: bool = False

    @property
    def allocates(self) -> bool:
        """True if a pass is accounted as random allocation; if not, a shuffled pass is accounted without
        amplification.
        """
        return (
            self.sampling == "shuffle"
            and self.batches_per_pass is not None
            and self.neighboring_relation == "add_or_remove_one"
        )

    def sigma(self, step: int) -> float:
        """Return the noise multiplier of a logical step, a pure function of public values; 0 for a non-private step."""
        return self.noise_multiplier * self.schedule(step) if self.is_private(step) else 0.0

    @property
    def relation_factor(self) -> float:
        """Factor of the relation on one sample's largest contribution: 2 if records are replaced, else 1."""
        return SENSITIVITY_FACTOR[self.neighboring_relation]

    def event(self, step: int) -> PrivacyEvent:
        """Return the event of logical step ``step``."""
        return self.event_of(self.sigma(step), step)

    def event_of(self, sigma: float, step: int) -> PrivacyEvent:
        """Return the event of a release with noise multiplier ``sigma`` in logical step ``step``."""
        if not self.is_private(step):
            return PrivacyEvent.non_private("a step of plain SGD: neither bound nor noise")
        if self.unsound:
            return PrivacyEvent.non_private(self.unsound)
        if not self.clipping.bounded:
            return PrivacyEvent.non_private("no clipping: one sample is unbounded")
        if self.correlation is not None:
            return PrivacyEvent.correlated(noise_multiplier=sigma, num_steps=self.correlation.steps)
        if self.sampling != "poisson":
            if self.allocates:
                assert self.batches_per_pass is not None
                return PrivacyEvent.allocation(noise_multiplier=sigma, num_batches=self.batches_per_pass)
            return PrivacyEvent.shuffle(noise_multiplier=sigma)
        assert self.sample_rate is not None
        return _poisson(sigma, self.sample_rate)

    def runs(self, start: int, stop: int, noise_multiplier: float | None = None) -> list[Run]:
        """Return the events of the logical steps ``start <= t < stop``, with equal events in a row counted together.

        Under "shuffle" and "cyclic" each item covers steps of one pass over the data, and its last number is 1 if it
        begins that pass and 0 if it continues it. So a pass whose sigma changes counts once, with its smallest sigma.
        The first item always begins a pass. Correlated noise is the exception: all planned steps are then one pass,
        which begins at step 0.

        Args:
            start: first logical step.
            stop: one past the last.
            noise_multiplier: sigma_0 to assume instead of the plan's own.
        """
        sigma = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        planned: list[Run] = []
        steps_per_pass, begin = self.steps_per_epoch or 1, start
        if self.correlation is not None:
            steps_per_pass, begin = self.correlation.steps, 0
        for factor, count in schedules.runs(self.schedule, start, stop):
            for first, steps in self._phases(start, count):
                event, end = self.event_of(sigma * factor, first), first + steps
                if not event.has_passes:
                    planned.append((event, steps))
                    continue
                while first < end:
                    place = first % steps_per_pass
                    part = min(end - first, steps_per_pass - place)
                    planned.append((event, part, int(place == 0 or first == begin)))
                    first += part
            start += count
        return planned

    def _phases(self, start: int, count: int) -> list[tuple[int, int]]:
        """Cut ``count`` steps from ``start`` on into phases of private and of plain steps."""
        if self.is_private is every_step:
            return [(start, count)]
        private = [self.is_private(step) for step in range(start, start + count)]
        cuts = [0, *(i for i in range(1, count) if private[i] != private[i - 1]), count]
        return [(start + low, high - low) for low, high in itertools.pairwise(cuts)]

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for a checkpoint and for comparison on resume."""
        state = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _UNSAVED}
        return state | {
            "clipping": repr(self.clipping),
            "correlation": None if self.correlation is None else self.correlation.state_dict(),
            "schedule": self._schedule_fingerprint(),
        }

    def _schedule_fingerprint(self) -> str:
        """Return a key that differs between schedules that differ in any step; empty if the run length is unbounded."""
        if self.steps is None:
            return ""
        grouped = schedules.runs(self.schedule, 0, self.steps)
        return hashlib.sha256(repr(grouped).encode()).hexdigest()
