"""Releases of private data: one event per logical batch, and runs of equal events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, get_args

EventKind = Literal["poisson", "gaussian", "shuffle", "allocation", "correlated", "non_private"]
PlannedRun = Sequence[Any]  # (event, steps) or (event, steps, passes)
_WITH_PASSES = ("shuffle", "allocation", "correlated")
#: Kinds that say how many steps one pass holds at most.
COUNTED = ("allocation", "correlated")


class Mechanism(NamedTuple):
    """The unit of accounting: one release, or one whole pass under random allocation.

    Args:
        sample_rate: Probability that a sample is in a given batch, in (0, 1]; 1 / num_batches for a pass.
        noise_multiplier: Standard deviation of the noise over the sensitivity; 0 if nothing is protected.
        num_batches: Number of batches of the pass; a sample joins exactly one of them. 1 for a single release.
    """

    sample_rate: float
    noise_multiplier: float
    num_batches: int = 1


@dataclass(frozen=True)
class PrivacyEvent:
    """One release of one logical batch.

    release = sum of clipped contributions + N(0, (noise_multiplier x sensitivity)^2 I)

    **Guarantee**: describes the mechanism, not the data; every field is public. A noise multiplier of 0 is legal and
    means that nothing is protected: epsilon is infinite.

    Args:
        kind: "poisson" (each sample joins with probability `sample_rate`), "gaussian" (every sample is in the
            batch), "shuffle" (every sample is in one batch of a pass; no amplification), "allocation" (every sample
            joins one of the `num_batches` batches of a pass, drawn uniformly and independently), "correlated" (the
            noise is correlated over a run of `num_batches` steps, which together are one Gaussian; the run counts as
            the pass), "non_private".
        noise_multiplier: Standard deviation of the noise over the sensitivity, in [0, inf); 0 for "non_private".
        sample_rate: Probability that a sample joins, in [0, 1]; 1 for every kind but "poisson".
        reason: Reason why nothing is protected; for "non_private" only.
        num_batches: Batches of a whole pass, at least 1; 1 for every kind but "allocation" and "correlated".

    Raises:
        ValueError: If a field is out of its range or does not belong to the kind.
        TypeError: If a multiplier or rate is not a number, or the reason is not a string.

    Example:
        >>> PrivacyEvent.poisson(noise_multiplier=1.1, sample_rate=0.01)
        PrivacyEvent(kind='poisson', noise_multiplier=1.1, sample_rate=0.01, reason='', num_batches=1)
    """

    kind: EventKind
    noise_multiplier: float
    sample_rate: float = 1.0
    reason: str = ""
    num_batches: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(EventKind):
            raise ValueError(
                f"Expected kind in {get_args(EventKind)}, got kind={self.kind!r}. Use its constructors, e.g. "
                "PrivacyEvent.poisson."
            )
        for name in ("noise_multiplier", "sample_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"Expected a real number, got {name}={value!r}. Pass a Python float.")
            object.__setattr__(self, name, float(value))
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"Expected 0 <= noise_multiplier < inf, got noise_multiplier={self.noise_multiplier}. "
                "Use 0 for a release without noise."
            )
        if not 0 <= self.sample_rate <= 1:
            raise ValueError(
                f"Expected 0 <= sample_rate <= 1, got sample_rate={self.sample_rate}. "
                "It is the expected batch size over the size of the data set."
            )
        if self.kind != "poisson" and self.sample_rate != 1:
            raise ValueError(
                f"Expected sample_rate=1 for kind={self.kind!r}, got sample_rate={self.sample_rate}. "
                'Only kind="poisson" is amplified by sampling: leave sample_rate out.'
            )
        if self.kind == "non_private" and self.noise_multiplier != 0:
            raise ValueError(
                f'Expected noise_multiplier=0 for kind="non_private", got noise_multiplier={self.noise_multiplier}. '
                "A release with accountable noise has another kind."
            )
        if not isinstance(self.reason, str):
            raise TypeError(f"Expected a string, got reason={self.reason!r}. Say in words why nothing protects.")
        if self.reason and self.kind != "non_private":
            raise ValueError(
                f'Expected a reason for kind="non_private" only, got reason={self.reason!r}. Leave it out.'
            )
        object.__setattr__(self, "num_batches", check_count(self.num_batches, name="num_batches", minimum=1))
        if self.kind not in COUNTED and self.num_batches != 1:
            raise ValueError(
                f"Expected num_batches=1 for kind={self.kind!r}, got num_batches={self.num_batches}. "
                f"Only the kinds {COUNTED} count the batches of a pass."
            )

    @property
    def has_passes(self) -> bool:
        """True if steps of this kind are accounted together, as one pass."""
        return self.kind in _WITH_PASSES

    @property
    def steps_per_pass(self) -> int | None:
        """Largest number of steps in one pass; None if the kind sets no limit."""
        return self.num_batches if self.kind in COUNTED else None

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism to account for: of each step, or of each pass if the kind has passes."""
        if self.kind == "allocation":
            return Mechanism(1 / self.num_batches, self.noise_multiplier, self.num_batches)
        return Mechanism(self.sample_rate, self.noise_multiplier)

    def shares_pass(self, other: PrivacyEvent) -> bool:
        """Return whether both events can be steps of one pass."""
        return self.has_passes and (self.kind, self.num_batches) == (other.kind, other.num_batches)

    @classmethod
    def poisson(cls, *, noise_multiplier: float, sample_rate: float) -> PrivacyEvent:
        """Return the release of one Poisson-sampled batch."""
        return cls("poisson", noise_multiplier, sample_rate)

    @classmethod
    def gaussian(cls, *, noise_multiplier: float) -> PrivacyEvent:
        """Return the release of one batch that holds every sample."""
        return cls("gaussian", noise_multiplier)

    @classmethod
    def shuffle(cls, *, noise_multiplier: float) -> PrivacyEvent:
        """Return the release of one batch of a pass over shuffled data."""
        return cls("shuffle", noise_multiplier)

    @classmethod
    def allocation(cls, *, noise_multiplier: float, num_batches: int) -> PrivacyEvent:
        """Return the release of one batch of a pass in which each sample joins one of `num_batches` batches."""
        return cls("allocation", noise_multiplier, num_batches=num_batches)

    @classmethod
    def correlated(cls, *, noise_multiplier: float, num_steps: int) -> PrivacyEvent:
        """Return one step of a run of `num_steps` steps whose correlated noise makes them one Gaussian together."""
        return cls("correlated", noise_multiplier, num_batches=num_steps)

    @classmethod
    def non_private(cls, reason: str) -> PrivacyEvent:
        """Return a release that nothing protects."""
        return cls("non_private", 0.0, reason=reason)


@dataclass(frozen=True)
class LedgerEntry:
    """A run of equal events.

    Args:
        event: The event of every step; if the kind has passes, with the smallest noise multiplier of any step.
        num_steps: Number of logical steps, at least 1.
        num_passes: Number of passes over the data that the steps belong to: at least 1 if the kind has passes, else 0.
    """

    event: PrivacyEvent
    num_steps: int
    num_passes: int = 0


def parse_run(run: PlannedRun) -> tuple[PrivacyEvent, int, int]:
    """Return (event, steps, passes) of a planned run given as two or three items.

    Args:
        run: `(event, steps)` or `(event, steps, passes)`; see `Ledger.extended`.

    Raises:
        ValueError: If `run` has another length, a count is no integer in range, or passes do not belong to the kind.
        TypeError: If the first item is not a `PrivacyEvent`.
    """
    if len(run) not in (2, 3):
        raise ValueError(f"Expected (event, steps) or (event, steps, passes), got {len(run)} items. Pass two or three.")
    event: PrivacyEvent = run[0]
    check_event(event)
    num_steps = check_count(run[1], name="steps", minimum=1)
    if not event.has_passes:
        if len(run) == 3 and run[2] != 0:
            raise ValueError(
                f"Expected passes for the kinds {_WITH_PASSES} only, got passes={run[2]} for kind={event.kind!r}. "
                "Leave them out."
            )
        return event, num_steps, 0
    least = -(-num_steps // event.steps_per_pass) if event.steps_per_pass else 1
    num_passes = check_count(run[2], name="passes", minimum=0) if len(run) == 3 else least
    check_passes(event, num_steps, num_passes)
    return event, num_steps, num_passes


def check_passes(event: PrivacyEvent, num_steps: int, num_passes: int) -> None:
    """Raise ValueError unless `num_passes` passes can hold `num_steps` steps; 0 means the open pass, not checked."""
    if num_passes > num_steps:
        raise ValueError(
            f"Expected passes <= steps, got passes={num_passes} and steps={num_steps}. Each pass has a step."
        )
    if event.steps_per_pass and num_passes and num_steps > num_passes * event.steps_per_pass:
        raise ValueError(
            f"Expected steps <= passes x num_batches, got steps={num_steps}, passes={num_passes} and "
            f"num_batches={event.num_batches}. A pass has one step per batch."
        )


def check_count(value: Any, *, name: str, minimum: int) -> int:
    """Return `value` as an int, or raise ValueError unless it is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"Expected an integer >= {minimum}, got {name}={value!r}. Pass a count.")
    return int(value)


def check_event(event: Any) -> None:
    """Raise TypeError unless `event` is a `PrivacyEvent`."""
    if not isinstance(event, PrivacyEvent):
        raise TypeError(f"Expected a PrivacyEvent, got {type(event).__name__}. Make one, e.g. by PrivacyEvent.poisson.")
