"""What callbacks ask of a private step, and which of it can be combined: the rules in one place.

Every mechanism is public or is paid for; what each does to the release of a logical step:

| mechanism | sensitivity S | live coordinates | noise std | ledger |
|---|---|---|---|---|
| clipping "flat", "automatic", PSAC | R | all | sigma_t S | Poisson(q, Gaussian(sigma_t)) |
| the same, per layer | sqrt(sum_l R_l^2) | all | sigma_t S | the same |
| ``TopAgg`` | sqrt(k); R with kept values | all: whose top k is private | sigma_t S | the same |
| schedule of the noise | - | - | sigma_t = sigma_0 f(t) | every sigma_t counts with its own steps |
| schedule of the bound, ``AutoThreshold`` | S x C_t / C_0 | - | follows S | unchanged |
| ``AdaptiveClipping`` | S x C_t / C_0 | one more: the count | z_g S, and s_b on the count | unchanged: both make up sigma_t |
| sparsification, pruning | S, norms under the mask | where all masks are true | 0 on masked ones: 0 for every sample | - |
| "replace_one" | 2 S | - | follows S | unchanged |
| several private optimizers (m) | S each | - | sqrt(m) sigma_t S each | one event of sigma_t |
| gradient canaries of ``PrivacyAudit`` | S: public records, clipped and added as real ones | - | - | unchanged |
| ``PublishedAutoThreshold``, plain steps of ``SwitchToDP``, no clipping, sigma 0 | none | - | - | non-private: epsilon is infinite |

Masks combine by "and". A mask and a bound are settled before the first sample of a logical batch and hold until it is
released: microbatches and accumulated batches all see the same. Two rules for one thing (two bounds, two schedules of
the noise) cannot be combined, nor can a bound that is learned, or diagnostics, with several private optimizers, nor any
bound with a clipping that has none. A plain step knows neither bound nor noise, so no bound learns from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_dp import schedules
from lightning_dp.auditing import Canaries
from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Threshold
from lightning_dp.masks import GradientMask
from lightning_dp.schedules import Schedule
from lightning_dp.step.diagnostics import Diagnostics
from lightning_dp.step.plan import every_step


@dataclass(frozen=True)
class RunLength:
    """How long a run is planned to be: what schedules may depend on.

    Args:
        steps: logical steps of the whole run; None when nothing bounds it.
        steps_per_epoch: logical steps of one epoch; None when unknown.
    """

    steps: int | None
    steps_per_epoch: int | None


def _constant(run: RunLength) -> Schedule:
    return schedules.constant()


def _always_private(run: RunLength) -> Callable[[int], bool]:
    return every_step


@dataclass
class Mechanisms:
    """What callbacks have set for one fit; every default is "off".

    **Guarantee**: holds public settings and rules over public state only.

    Args:
        noise_schedule: run length -> schedule of factors on sigma.
        is_private: run length -> whether a logical step is private (plain SGD where it is not).
        threshold: the bound of clipping from step to step.
        masks: owner -> which coordinates are live.
        diagnostics: un-noised figures on request.
        canaries: public additional records in gradient space.
        extra_records: public additional records of the training set.
    """

    noise_schedule: Callable[[RunLength], Schedule] = _constant
    is_private: Callable[[RunLength], Callable[[int], bool]] = _always_private
    threshold: Threshold = field(default_factory=Threshold)
    masks: dict[Hashable, GradientMask] = field(default_factory=dict)
    diagnostics: Diagnostics | None = None
    canaries: Canaries = field(default_factory=Canaries)
    extra_records: Sequence[Any] = ()
    _owners: dict[str, object] = field(default_factory=dict)

    def claim(self, what: str, owner: object) -> None:
        """Take note that a callback decides over "the noise schedule", "the clipping bound" or "the private phases".

        Raises:
            ValueError: another one does already.
        """
        taken = self._owners.setdefault(what, owner)
        if taken is not owner:
            raise ValueError(
                f"Expected one callback for {what}, got {type(taken).__name__} and {type(owner).__name__}. Leave one of them out, "
                "or join their rules in one callable."
            )

    def described(self) -> tuple[str, ...]:
        """What callbacks decide over, with their public settings; for the privacy card."""
        owners = dict.fromkeys(id(owner) for owner in self._owners.values())
        parts = [f"{what}: {_describe(owner)}" for what, owner in self._owners.items()]
        parts += [f"the gradient mask: {_describe(owner)}" for owner in self.masks if id(owner) not in owners]
        return tuple(sorted(parts))

    @property
    def never_private(self) -> str:
        """Why no step of the run has a finite epsilon; empty where they have."""
        return self.threshold.unsound

    @property
    def sometimes_plain(self) -> bool:
        """Whether some steps may be plain SGD."""
        return self.is_private is not _always_private

    def check(self, clipping: Clipping, *, target_epsilon: float | None, num_private_optimizers: int) -> None:
        """Refuse what cannot be combined, before any data is touched.

        Raises:
            ValueError: with the names of both sides and the way out.
        """
        if target_epsilon is not None and (self.never_private or self.sometimes_plain):
            what = self.never_private or "steps of plain SGD"
            raise ValueError(
                f"Expected private steps only with target_epsilon={target_epsilon:g}, got {what}. Epsilon is infinite, so there is "
                "nothing to calibrate to: pass noise_multiplier."
            )
        if self.diagnostics is not None and num_private_optimizers > 1:
            raise ValueError(
                f"Expected one private optimizer with GradientDiagnostics, got {num_private_optimizers}. Its figures speak of one "
                "sum of gradients: leave the callback out, or use one optimizer."
            )
        if clipping.needs_gradients and self.canaries.needs_factors:
            raise ValueError(
                f"Expected a clipping by a factor with canaries in gradient space, got {clipping.name!r}. It would have to see each "
                "canary's whole gradient: pass PrivacyAudit(canaries=...), records that pass through the model."
            )
        rule = type(self.threshold).__name__
        if type(self.threshold) is Threshold:
            return
        if not clipping.bounded:
            raise ValueError(
                f"Expected a clipping with a bound for {rule} to move, got {clipping.name!r}. Pass clipping='flat', or leave the "
                "callback out."
            )
        if clipping.needs_gradients and self.threshold.unsound:
            raise ValueError(
                f"Expected a clipping by a factor with {rule}, got {clipping.name!r}. It replaces the clipping by its own scaling."
            )
        clipping.scaled(0.5)
        if self.threshold.learns and num_private_optimizers > 1:
            raise ValueError(
                f"Expected one private optimizer with {rule}, got {num_private_optimizers}. Each release would move the bound of the "
                "others: use ClippingScheduler, or one optimizer."
            )


def _describe(owner: object) -> str:
    """A callback by name and plain public attributes, those of what it holds included."""
    plain: dict[str, object] = {}
    for name, value in vars(owner).items():
        held = type(value).__module__.startswith("lightning_dp.") and hasattr(value, "__dict__")
        plain |= vars(value) if held and not name.startswith("_") else {name: value}
    shown = (
        f"{name}={value!r}"
        for name, value in plain.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    )
    return f"{type(owner).__name__}({', '.join(shown)})"
