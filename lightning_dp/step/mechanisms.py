"""Mechanisms that callbacks request: their registration, and the combinations that are allowed.

Every mechanism is public or is paid for. Its effect on the release of a logical step:

| mechanism | sensitivity S | active coordinates | noise std | ledger |
|---|---|---|---|---|
| clipping "flat", "automatic", PSAC | R | all | sigma_t S | Poisson(q, Gaussian(sigma_t)) |
| the same, per layer | sqrt(sum_l R_l^2) | all | sigma_t S | the same |
| ``TopAgg`` | sqrt(k); R with kept values | all, since the top k are private | sigma_t S | the same |
| schedule of the noise | - | - | sigma_t = sigma_0 f(t) | every sigma_t counts with its own steps |
| schedule of the bound, ``AutoThreshold`` | S x C_t / C_0 | - | follows S | unchanged |
| ``AdaptiveClipping`` | S x C_t / C_0 | one more: the count | z_g S; s_b on the count | unchanged: both give sigma_t |
| sparsification, pruning | S, norms under the mask | where all masks are true | 0 where masked, like samples | - |
| "replace_one" | 2 S | - | follows S | unchanged |
| several private optimizers (m) | S each | - | sqrt(m) sigma_t S each | one event of sigma_t |
| gradient canaries of ``PrivacyAudit`` | S: public records, clipped and added as real ones | - | - | unchanged |
| ``PublishedAutoThreshold``, plain steps, no clipping, sigma 0 | none | - | - | non-private: infinite epsilon |

Masks combine by "and". Mask and bound are fixed before the first sample of a logical batch and stay the same until its
release, over all microbatches and accumulated batches. Not combined are: two bounds; two noise schedules; a learned
bound, or diagnostics, with several private optimizers; a bound with a clipping that has none. A non-private step has
neither bound nor noise, so no bound learns from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_dp import schedules
from lightning_dp.auditing import Canaries
from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.masks import GradientMask
from lightning_dp.reporting.files import CardFiles
from lightning_dp.run_length import RunLength
from lightning_dp.schedules import Schedule
from lightning_dp.step.diagnostics import Diagnostics
from lightning_dp.step.limit import Limit
from lightning_dp.step.plan import every_step

#: Requests of callbacks, with their names in messages and on the privacy card.
_NAMES = {
    "noise_schedule": "the schedule of the noise",
    "is_private": "the private phases",
    "bound": "the clipping bound",
    "mask": "the gradient mask",
    "canaries": "the canaries in gradient space",
    "diagnostics": "the diagnostics",
    "limit": "the limit on epsilon",
    "extra_records": "the canaries in input space",
    "card": "the privacy card",
}
_ON_THE_CARD = {"noise_schedule", "is_private", "bound", "mask", "diagnostics"}


_OFF: dict[str, Any] = {
    "noise_schedule": lambda length: schedules.constant(),
    "is_private": lambda length: every_step,
    "bound": Bound(),
    "canaries": Canaries(),
    "diagnostics": Diagnostics(),
    "limit": Limit(),
    "extra_records": tuple,
    "card": CardFiles(),
}


class Mechanisms:
    """Requests of callbacks for one fit; without a request, a mechanism is an object that does nothing.

    **Guarantee**: holds public settings and rules over public state only.

    Example:
        >>> mechanisms = Mechanisms()
        >>> mechanisms.add("a callback", noise_schedule=lambda length: lambda step: 0.9**step)
        >>> mechanisms.noise_schedule(RunLength(steps=10, steps_per_epoch=None))(2)
        0.81
        >>> mechanisms.bound.is_fixed, mechanisms.canaries.reads_sums
        (True, False)
    """

    def __init__(self) -> None:
        self._asked: dict[int, tuple[object, dict[str, Any]]] = {}
        self._chosen: dict[str, Any] = {}  # of all owners, since every step reads it often
        self.masks: tuple[GradientMask, ...] = ()
        """Gradient masks, empty before ``begin_run``; a coordinate is active if it is active in all masks."""
        self._begun = False

    # ---------------------------------------------------------------- for callbacks

    def add(
        self,
        owner: object,
        *,
        noise_schedule: Callable[[RunLength], Schedule] | None = None,
        is_private: Callable[[RunLength], Callable[[int], bool]] | None = None,
        bound: Bound | None = None,
        mask: Callable[[RunLength], GradientMask] | None = None,
        canaries: Canaries | None = None,
        diagnostics: Diagnostics | None = None,
        limit: Limit | None = None,
        extra_records: Callable[[], Sequence[Any]] | None = None,
        card: CardFiles | None = None,
    ) -> None:
        """Register the mechanisms that a callback requests; callbacks call this in ``setup``.

        Masks of several owners combine by "and"; any other mechanism has one owner. A second call by the same owner
        replaces the first.

        Args:
            owner: the callback.
            noise_schedule: run length -> schedule of factors on sigma.
            is_private: run length -> function that tells whether a logical step is private (else plain SGD).
            bound: bound of the clipping from step to step.
            mask: run length -> mask of the gradient.
            canaries: public additional records in gradient space.
            diagnostics: un-noised figures.
            limit: limit on the number of steps of the run.
            extra_records: returns public records to add to the training set; called when its data is set up, after a
                checkpoint was read.
            card: destination of the privacy card.

        Raises:
            ValueError: another owner has asked for the same.
            RuntimeError: the plan of the run is made already.
        """
        given = locals()
        if self._begun:
            raise RuntimeError(
                f"{type(owner).__name__} asked for a mechanism after the plan of the run was made, so the plan would "
                "not include it. Call strategy.mechanisms.add in the callback's setup."
            )
        asked = {what: value for what, value in given.items() if what in _NAMES and value is not None}
        for what in asked.keys() - {"mask"}:  # masks combine
            for other, others in self._asked.values():
                if other is not owner and what in others:
                    raise ValueError(
                        f"Expected one callback for {_NAMES[what]}, got {type(other).__name__} and "
                        f"{type(owner).__name__}. Leave one of them out."
                    )
        self._asked[id(owner)] = owner, asked
        self._choose()

    def remove(self, owner: object) -> None:
        """Drop all requests of an owner."""
        self._asked.pop(id(owner), None)
        self._choose()

    def _choose(self) -> None:
        self._chosen = {what: value for _, asked in self._asked.values() for what, value in asked.items()}

    # ---------------------------------------------------------------- for the step

    def begin_run(self, length: RunLength) -> None:
        """Make the masks and start the clipping bound for a run length; called whenever the plan is made."""
        self._begun = True
        self.masks = tuple(asked["mask"](length) for _, asked in self._asked.values() if "mask" in asked)
        self.bound.begin_run(length)

    def _get(self, what: str) -> Any:
        return self._chosen[what] if what in self._chosen else _OFF[what]

    def _owner(self, what: str) -> str:
        """Return the name of the callback that requested a mechanism."""
        return next(type(owner).__name__ for owner, asked in self._asked.values() if what in asked)

    @property
    def noise_schedule(self) -> Callable[[RunLength], Schedule]:
        """Function from the run length to the schedule of factors on sigma."""
        return self._get("noise_schedule")  # type: ignore[no-any-return]

    @property
    def is_private(self) -> Callable[[RunLength], Callable[[int], bool]]:
        """Function from the run length to a function that tells whether a logical step is private."""
        return self._get("is_private")  # type: ignore[no-any-return]

    @property
    def bound(self) -> Bound:
        """The clipping bound, which may change from step to step."""
        return self._get("bound")  # type: ignore[no-any-return]

    @property
    def canaries(self) -> Canaries:
        """Public additional records in gradient space."""
        return self._get("canaries")  # type: ignore[no-any-return]

    @property
    def diagnostics(self) -> Diagnostics:
        """The object that computes un-noised figures on request."""
        return self._get("diagnostics")  # type: ignore[no-any-return]

    @property
    def limit(self) -> Limit:
        """Limit on the steps of the run."""
        return self._get("limit")  # type: ignore[no-any-return]

    @property
    def extra_records(self) -> Sequence[Any]:
        """Public additional records of the training set."""
        return self._get("extra_records")()  # type: ignore[no-any-return]

    @property
    def card(self) -> CardFiles:
        """Destination of the privacy card."""
        return self._get("card")  # type: ignore[no-any-return]

    def described(self) -> tuple[str, ...]:
        """Return the requests that the privacy card names, each with its callback and public settings."""
        return tuple(
            sorted(
                f"{_NAMES[what]}: {_describe(owner)}"
                for owner, asked in self._asked.values()
                for what in asked.keys() & _ON_THE_CARD
            )
        )

    @property
    def never_private(self) -> str:
        """Reason why no step of the run has a finite epsilon; empty if steps have one."""
        return self.bound.unsound

    @property
    def sometimes_plain(self) -> bool:
        """True if some steps may be plain SGD."""
        return any("is_private" in asked for _, asked in self._asked.values())

    def check(self, clipping: Clipping, *, target_epsilon: float | None, num_private_optimizers: int) -> None:
        """Refuse unsupported combinations of mechanisms, clipping and optimizers, before any data is touched.

        Raises:
            ValueError: a combination is not supported; the message names both sides and says what to do.
        """
        if target_epsilon is not None and (self.never_private or self.sometimes_plain):
            what = self.never_private or "steps of plain SGD"
            raise ValueError(
                f"Expected private steps only with target_epsilon={target_epsilon:g}, got {what}. Epsilon is infinite, "
                "so there is nothing to calibrate to: pass noise_multiplier."
            )
        if self.diagnostics.reads_sums and num_private_optimizers > 1:
            raise ValueError(
                f"Expected one private optimizer with {self._owner('diagnostics')}, got {num_private_optimizers}. Its "
                "figures describe one sum of gradients: leave the callback out, or use one optimizer."
            )
        if self.canaries.needs_factors:
            clipping.check_scales(
                "canaries in gradient space",
                "It would have to see each canary's whole gradient: pass PrivacyAudit(canaries=...), records that "
                "pass through the model.",
            )
        if self.canaries.needs_factors and clipping.shares_noise:
            raise ValueError(
                "Expected the same noise on all coordinates with canaries in gradient space, got "
                'PerLayerClipping(noise="least"), its default. Their scores are those of one std: pass '
                "PerLayerClipping(noise='equal'), or PrivacyAudit(canaries=...)."
            )
        if not self.bound.is_fixed:
            self._check_bound(clipping, self._owner("bound"), num_private_optimizers)

    def _check_bound(self, clipping: Clipping, owner: str, num_private_optimizers: int) -> None:
        if not clipping.bounded:
            raise ValueError(
                f"Expected a clipping with a bound for {owner} to move, got {clipping.name!r}. Pass clipping='flat', "
                "or leave the callback out."
            )
        if self.bound.unsound:
            clipping.check_scales(owner, "It replaces the clipping by its own scaling.")
        clipping.scaled(0.5)
        if self.bound.learns and num_private_optimizers > 1:
            raise ValueError(
                f"Expected one private optimizer with {owner}, got {num_private_optimizers}. Each release would move "
                "the bound of the others: use ClippingScheduler, or one optimizer."
            )


def _describe(owner: object) -> str:
    """Return a callback's name and simple public attributes, including attributes of this package's objects in it."""
    plain: dict[str, object] = {}
    for name, value in getattr(owner, "__dict__", {}).items():
        held = type(value).__module__.startswith("lightning_dp.") and hasattr(value, "__dict__")
        plain |= vars(value) if held and not name.startswith("_") else {name: value}
    shown = (
        f"{name}={value!r}"
        for name, value in plain.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    )
    return f"{type(owner).__name__}({', '.join(shown)})"
