"""Correlation: the public facts of a run with correlated noise, and the features that such a run cannot use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_dp import schedules
from lightning_dp.errors import PrivacyError
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.run_length import RunLength
from lightning_dp.sampling import PrivateDataLoader, SamplingFacts

if TYPE_CHECKING:
    from lightning_dp.step.mechanisms import Mechanisms

_INDEPENDENT = "use independent noise (noise=None)"


@dataclass(frozen=True)
class Correlation:
    """Correlated noise of one planned run: ``v_t = sum_j r_j z_{t-j}`` in place of independent ``z_t``.

    **Guarantee**: with noise ``sigma * sensitivity`` times the bound on one contribution, all steps together are one
    Gaussian mechanism of multiplier sigma, if every unit takes part at most ``passes`` times, at least ``separation``
    steps apart.

    Args:
        noise: planned settings.
        steps: logical steps n of the whole run.
        separation: steps b between two uses of a unit.
        passes: most uses k of a unit.
        order: of a stream: what its order depends on, see ``SamplingFacts``.
    """

    noise: CorrelatedNoise
    steps: int
    separation: int
    passes: int
    order: tuple[int, ...] = ()

    @property
    def sensitivity(self) -> float:
        """Sensitivity sens(C), for contributions of norm at most 1."""
        return self.noise.sensitivity(self.steps, self.separation, self.passes)

    def describe(self) -> str:
        """Return a description of the noise in words: its bands or decay, and its number of steps."""
        noise = self.noise
        kind = f"{noise.bands} bands" if noise.bands is not None else f"decay {noise.decay:.4g}"
        return f"correlated between steps ({kind}), one Gaussian for the whole run of {self.steps} steps"

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "decay": self.noise.decay,
            "bands": self.noise.bands,
            "steps": self.steps,
            "separation": self.separation,
            "passes": self.passes,
            **({"order": list(self.order)} if self.order else {}),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Correlation:
        """Return the correlation that ``state_dict`` saved.

        Raises:
            ValueError: values out of range.
        """
        noise = CorrelatedNoise(decay=state["decay"], bands=state["bands"])
        return cls(noise, state["steps"], state["separation"], state["passes"], tuple(state.get("order", ())))


def plan_correlation(
    noise: CorrelatedNoise,
    facts: SamplingFacts,
    mechanisms: Mechanisms,
    length: RunLength,
    restored: Mapping[str, Any] | None,
) -> Correlation:
    """Return the correlation of a planned run; raise an error if the run does not allow one.

    Args:
        noise: the user's argument.
        facts: of the private loader.
        mechanisms: requests of callbacks, after ``begin_run``.
        length: planned length of the whole run.
        restored: the plan of the checkpoint being resumed, if any; an automatic decay is kept if the run is the same.

    Raises:
        ValueError: a run without a known end or order, or mechanisms that do not combine with it.
    """
    if length.steps is None:
        raise ValueError(
            "Expected a bounded run with correlated noise, got steps=None. Its one privacy event covers a planned "
            "number of steps: set max_epochs or max_steps."
        )
    steps = max(1, length.steps)
    _check_mechanisms(mechanisms, length, steps)
    # a stream restarts with every pass, even a shortened one; the cyclic order continues
    passes, separation = facts.passes(steps), facts.separation or steps
    if facts.sampling == "shuffle" and facts.separation is not None:
        separation = length.steps_per_epoch or separation
        passes = -(-steps // separation)
    before = None if restored is None else restored.get("correlation")
    if before is not None and noise.decay == "auto":
        known = Correlation.from_state_dict(before)
        if (known.steps, known.separation, known.passes) == (steps, separation, passes) and noise.bands is None:
            return replace(known, order=facts.order)
    return Correlation(noise.planned(steps, separation, passes), steps, separation, passes, facts.order)


def _check_mechanisms(mechanisms: Mechanisms, length: RunLength, steps: int) -> None:
    if len(schedules.runs(mechanisms.noise_schedule(length), 0, steps)) > 1 or mechanisms.sometimes_plain:
        raise ValueError(
            "Expected the same noise multiplier in all steps with correlated noise, got a schedule or plain steps. "
            "Noise of earlier steps is cancelled later, so its scale must stay: leave the callback out, or "
            f"{_INDEPENDENT}."
        )
    if any(len({mask.version(step) for step in range(steps)}) > 1 for mask in mechanisms.masks):
        raise ValueError(
            "Expected one mask for the whole run with correlated noise, got one that changes. Noise that is masked "
            f"later would not be cancelled: keep the mask constant, or {_INDEPENDENT}."
        )
    if mechanisms.bound.num_statistics:
        raise ValueError(
            "Expected a bound without noisy counts with correlated noise, got one that counts. The counts would need "
            f"noise of their own in every step: use a fixed or scheduled bound, or {_INDEPENDENT}."
        )


def check_resumed(now: Mapping[str, Any], restored: Mapping[str, Any] | None, start: int) -> None:
    """Check that a run with correlated noise goes on as it was planned, or raise PrivacyError."""
    if start == 0 or restored is None or not (now.get("correlation") or restored.get("correlation")):
        return
    names = ("correlation", "noise_multiplier", "sampling", "expected_batch_size", "clipping", "neighboring_relation")
    differing = [name for name in names if now.get(name) != restored.get(name)]
    if differing:
        name = differing[0]
        raise PrivacyError(
            f"Expected {name}={restored.get(name)!r} as in the run being resumed, got {name}={now.get(name)!r}. "
            "Correlated noise is one privacy event for the whole planned run, which can be cut short but neither "
            "extended nor changed: go on with the same settings, loader and length."
        )


def check_releases(*, automatic: bool, num_private_optimizers: int, shares_noise: bool) -> None:
    """Check that every logical batch makes exactly one release, with the same noise std on all coordinates.

    Raises:
        ValueError: manual optimization, several private optimizers, or noise that is shared out between groups.
    """
    if shares_noise:
        raise ValueError(
            'Expected the same noise on all coordinates with correlated noise, got PerLayerClipping(noise="least"), '
            "its default. Earlier noise is drawn again for the whole gradient at once: pass "
            f"PerLayerClipping(noise='equal'), or {_INDEPENDENT}."
        )
    if not automatic or num_private_optimizers > 1:
        got = "manual optimization" if not automatic else f"{num_private_optimizers} private optimizers"
        raise ValueError(
            f"Expected automatic optimization with one private optimizer for correlated noise, got {got}. Noise is "
            f"cancelled from step to step, so each batch must make exactly one release: {_INDEPENDENT}."
        )


def check_mask_may_change(since: int) -> None:
    """Check that no step has used correlated noise yet, when a mask is about to change, or raise PrivacyError."""
    if since:
        raise PrivacyError(
            f"The gradient mask changed after {since} steps with correlated noise. Noise of earlier steps would not be "
            f"cancelled where it was added: keep the mask for the whole run, or {_INDEPENDENT}."
        )


def begin_order(correlation: Correlation | None, loader: PrivateDataLoader, step: int) -> None:
    """Make a loader resume at the batch of a logical step, if the noise is correlated.

    Raises:
        PrivacyError: the order cannot continue at that step.
    """
    if correlation is not None:
        loader.start_at(step, steps_per_pass=correlation.separation)


def check_reload(correlation: Correlation | None, before: PrivateDataLoader | None, loader: PrivateDataLoader) -> None:
    """Check that the order of the data stays the same when a loader is replaced during a run, or raise PrivacyError."""
    if correlation is None or before is None or before is loader:
        return
    if loader.facts.sampling == "cyclic" and loader.facts.add_remove_changes_one_batch:
        raise PrivacyError(
            "The training loader was made again during a run with correlated noise, which draws another secret "
            "assignment to batches. Units would come back sooner than accounted for: leave "
            "reload_dataloaders_every_n_epochs out, or pass neighboring_relation='zero_out', whose assignment is "
            "public."
        )


def check_position(position: int | None, step: int) -> None:
    """Check that a logical batch is the next one in the order of the data, or raise PrivacyError."""
    if position != step:
        raise PrivacyError(
            f"Logical step {step} got the batch at position {position} of the order of the data. Its units would come "
            "back sooner than the correlated noise accounts for. Take one step for every batch of the private loader, "
            "in its order."
        )
