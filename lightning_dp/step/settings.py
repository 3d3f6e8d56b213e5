"""The arguments of ``DPStrategy``, validated once and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from typing_extensions import Self

from lightning_dp import _validate as check
from lightning_dp.clipping import Clipping, make_clipping
from lightning_dp.noise import CorrelatedNoise, GaussianNoise
from lightning_dp.sampling import Unit
from lightning_dp.sampling.checks import SAMPLINGS

#: Allowed values of the string arguments; command lines and editors read them.
ClippingName = Literal["flat", "per_layer", "automatic", "psac", "none"]
AccountantName = Literal["pld", "rdp", "prv", "gdp", "tcdp"]
Sampling = Literal["poisson", "shuffle", "cyclic"]
Relation = Literal["add_or_remove_one", "replace_one", "zero_out"]
LossReduction = Literal["auto", "mean", "sum"]
UnitGradient = Literal["mean", "sum"]
GradSample = Literal["auto", "rules", "single", "materialize"]
_FLAGS = (
    "check_per_sample", "allow_public_checkpoint", "secure_rng", "strict_logging", "tune_process", "per_sample_loss",
)  # fmt: skip
#: Settings that are arguments of ``private_dataloader``.
_DRAWING = ("sampling", "microbatch_size", "seed", "unit", "records_per_unit", "fixed_order")
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's settings; ``DPStrategy`` documents every field."""

    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    target_delta: float | None = None
    max_grad_norm: float = 1.0
    clipping: str | Clipping = "flat"
    accountant: str = "pld"
    sampling: str = "poisson"
    microbatch_size: int | None = None
    grad_sample: GradSample = "auto"
    neighboring_relation: str = "add_or_remove_one"
    memory: Literal["fast", "lean"] = "fast"
    check_per_sample: bool = True
    allow_public_checkpoint: bool = False
    secure_rng: bool = False
    seed: int | None = None
    loss_reduction: str = "auto"
    public_optimizers: tuple[int, ...] = ()
    strict_logging: bool = False
    tune_process: bool = True
    unit: Unit | None = field(default=None, repr=False, compare=False)
    records_per_unit: int | None = None
    unit_gradient: str = "mean"
    noise: CorrelatedNoise | None = None
    fixed_order: bool = False
    per_sample_loss: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Return settings from named values, such as the arguments of a constructor; other names are ignored."""
        return cls(**{each.name: arguments[each.name] for each in fields(cls)})

    def __post_init__(self) -> None:
        """Check every argument."""
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                "Expected exactly one of noise_multiplier and target_epsilon, got "
                f"noise_multiplier={self.noise_multiplier!r} and target_epsilon={self.target_epsilon!r}. Pass the "
                "noise, or the epsilon it should be calibrated to."
            )
        if self.noise_multiplier is not None:
            check.check_nonnegative(
                "noise_multiplier", self.noise_multiplier, "0 is legal and means an infinite epsilon."
            )
            if self.noise_multiplier > 0:
                check.check_scale("noise_multiplier", self.noise_multiplier, 1e-9, 1e9)
        if self.target_epsilon is not None:
            check.check_positive("target_epsilon", self.target_epsilon)
        if self.target_delta is not None:
            check.check_probability("target_delta", self.target_delta, "Pass less than one over the number of records.")
        check.check_positive("max_grad_norm", self.max_grad_norm)
        check.check_scale("max_grad_norm", self.max_grad_norm, 1e-20, 1e20)
        check.check_choice("sampling", self.sampling, SAMPLINGS)
        if self.microbatch_size is not None:
            check.check_count("microbatch_size", self.microbatch_size)
        check.check_choice("grad_sample", self.grad_sample, ("auto", "rules", "single", "materialize"))
        check.check_choice("neighboring_relation", self.neighboring_relation, RELATIONS)
        check.check_choice("memory", self.memory, ("fast", "lean"))
        check.check_choice("loss_reduction", self.loss_reduction, ("auto", "mean", "sum"))
        object.__setattr__(self, "public_optimizers", check_positions(self.public_optimizers))
        self._check_unit()
        self._check_noise()
        for name in _FLAGS:
            check.check_flag(name, getattr(self, name))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(
                f"Expected seed to be a whole number >= 0 or None, got seed={self.seed!r}. Leave it out to train."
            )
        if self.seed is not None and self.secure_rng:
            raise ValueError(
                f"Expected secure_rng=True without a seed, got seed={self.seed!r}. A seed makes the noise predictable; "
                "drop one."
            )
        if self.per_sample_loss and self.grad_sample in ("rules", "materialize"):
            raise ValueError(
                "Expected grad_sample 'auto' or 'single' with per_sample_loss=True, got "
                f"grad_sample={self.grad_sample!r}. Records run alone where a batch does not "
                "give their own losses: leave grad_sample out."
            )
        clipping = self.make_clipping()
        if clipping is self.clipping and self.max_grad_norm not in (1.0, getattr(clipping, "max_grad_norm", None)):
            raise ValueError(
                f"Expected max_grad_norm with the name of a clipping, got max_grad_norm={self.max_grad_norm!r} with "
                f"clipping={clipping!r}. An object has its own bound: pass the norm to it alone."
            )
        if not clipping.bounded and self.target_epsilon is not None:
            raise ValueError(
                f"Expected a clipping that bounds each sample with target_epsilon={self.target_epsilon!r}, got "
                f"clipping={self.clipping!r}. Without clipping epsilon is infinite: pass noise_multiplier instead."
            )

    def _check_unit(self) -> None:
        check.check_choice("unit_gradient", self.unit_gradient, ("mean", "sum"))
        if self.records_per_unit is not None:
            check.check_count("records_per_unit", self.records_per_unit)
        elif self.unit is not None:
            raise ValueError(
                "Expected records_per_unit with a unit, got records_per_unit=None. Pass the most records that a user "
                "may bring to one batch, such as 4."
            )
        elif self.unit_gradient != "mean":
            raise ValueError(
                f"Expected unit_gradient with a unit, got unit_gradient={self.unit_gradient!r} without one. Pass unit "
                "and records_per_unit to protect users."
            )

    def _check_noise(self) -> None:
        check.check_flag("fixed_order", self.fixed_order)
        if self.noise is None:
            return
        if not isinstance(self.noise, CorrelatedNoise):
            raise TypeError(
                f"Expected noise to be a CorrelatedNoise or None, got {type(self.noise).__name__}. Pass "
                "CorrelatedNoise() for data in a fixed order."
            )
        if self.sampling == "poisson":
            raise ValueError(
                "Expected data in a fixed order with correlated noise, got sampling='poisson'. Noise that cancels "
                "between steps needs units that come back at a known distance: use sampling='cyclic', or 'shuffle' "
                "for a stream."
            )
        if self.secure_rng:
            raise ValueError(
                "Expected secure_rng=False with correlated noise, got secure_rng=True. Its noise is drawn again from "
                "a key in place of being kept, which the cryptographic generator cannot do: leave one out."
            )

    @property
    def protects(self) -> str:
        """The unit whose presence is hidden: "user" or "record"."""
        return "record" if self.records_per_unit is None else "user"

    @property
    def drawing(self) -> dict[str, Any]:
        """Arguments of ``private_dataloader`` that follow from these settings."""
        # the assignment is public only under relations that keep the other records in place
        public = self.sampling == "cyclic" and self.neighboring_relation != "add_or_remove_one"
        given = {name: getattr(self, name) for name in _DRAWING}
        return {"public_assignment": 0 if public else None, **given, "microbatch_size": self.samples_at_once}

    def make_clipping(self) -> Clipping:
        """Return the clipping object that ``clipping`` and ``max_grad_norm`` describe."""
        return make_clipping(self.clipping, self.max_grad_norm)

    def make_noise(self, rank: int) -> GaussianNoise:
        """Return what draws the noise of one process; with a seed, of ranks apart from each other."""
        seed = None if self.seed is None else self.seed * 1_000_003 + rank
        return GaussianNoise(seed=seed, secure=self.secure_rng, tuned=self.tune_process)

    @property
    def runs_samples_alone(self) -> bool:
        """True if every microbatch has one sample by the user's choice, so that plain autograd gives its gradient."""
        unchecked = self.per_sample_loss and not self.checks_own_losses
        return self.microbatch_size == 1 or self.grad_sample == "single" or unchecked

    @property
    def checks_own_losses(self) -> bool:
        """True if losses of records in a batch can be compared with those of records run alone."""
        return self.check_per_sample and self.records_per_unit is None

    @property
    def counts_samples_alone(self) -> bool:
        """True if layers may mix samples, since the loss of each is computed, or compared with one computed, alone."""
        return self.runs_samples_alone or self.per_sample_loss

    @property
    def may_run_alone(self) -> bool:
        """True if samples run one at a time where no rule can follow the module."""
        return self.grad_sample == "auto"

    @property
    def samples_at_once(self) -> int | None:
        """Largest number of samples per microbatch; None for no limit."""
        return 1 if self.runs_samples_alone else self.microbatch_size


def check_positions(positions: Sequence[int]) -> tuple[int, ...]:
    """Check the positions of public optimizers, and return them as a tuple.

    Raises:
        TypeError: an argument that is not a sequence.
        ValueError: an element that is not a position 0, 1, ...
    """
    if not isinstance(positions, Sequence):
        raise TypeError(
            f"Expected public_optimizers to be a list of positions, got public_optimizers={positions!r}. Pass [0] for "
            "the first optimizer that configure_optimizers returns."
        )
    advice = "Pass the place of each public optimizer in what configure_optimizers returns."
    return check.check_positions("public_optimizers", positions, advice)
