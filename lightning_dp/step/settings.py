"""The arguments of ``DPStrategy``, validated once and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_dp import _validate as check
from lightning_dp.clipping import Clipping, make_clipping

#: What the strings among the arguments may be; command lines and editors read it.
ClippingName = Literal["flat", "per_layer", "automatic", "psac", "none"]
AccountantName = Literal["pld", "rdp", "prv", "gdp", "tcdp"]
Sampling = Literal["poisson", "shuffle"]
Relation = Literal["add_or_remove_one", "replace_one", "zero_out"]
LossReduction = Literal["mean", "sum"]
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's settings; ``DPStrategy`` documents every field."""

    noise_multiplier: float | None
    target_epsilon: float | None
    target_delta: float | None
    max_grad_norm: float
    clipping: str | Clipping
    accountant: str
    sampling: str
    microbatch_size: int | None
    grad_sample: Literal["auto", "materialize"]
    neighboring_relation: str
    memory: Literal["fast", "lean"]
    check_per_sample: bool
    allow_public_checkpoint: bool
    secure_rng: bool
    seed: int | None
    loss_reduction: str
    public_optimizers: tuple[int, ...]
    strict_logging: bool
    tune_process: bool = True

    def __post_init__(self) -> None:
        """Check every argument."""
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                "Expected exactly one of noise_multiplier and target_epsilon, got "
                f"noise_multiplier={self.noise_multiplier!r} and target_epsilon={self.target_epsilon!r}. Pass the noise, or "
                "the epsilon it should be calibrated to."
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
        check.check_choice("sampling", self.sampling, ("poisson", "shuffle"))
        if self.microbatch_size is not None:
            check.check_count("microbatch_size", self.microbatch_size)
        check.check_choice("grad_sample", self.grad_sample, ("auto", "materialize"))
        check.check_choice("neighboring_relation", self.neighboring_relation, RELATIONS)
        check.check_choice("memory", self.memory, ("fast", "lean"))
        check.check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        for name in ("check_per_sample", "allow_public_checkpoint", "secure_rng", "strict_logging", "tune_process"):
            check.check_flag(name, getattr(self, name))
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(
                f"Expected seed to be a whole number >= 0 or None, got seed={self.seed!r}. Leave it out to train."
            )
        if self.seed is not None and self.secure_rng:
            raise ValueError(
                f"Expected secure_rng=True without a seed, got seed={self.seed!r}. A seed makes the noise predictable; drop one."
            )
        clipping = self.make_clipping()
        if not clipping.bounded and self.target_epsilon is not None:
            raise ValueError(
                f"Expected a clipping that bounds each sample with target_epsilon={self.target_epsilon!r}, got "
                f"clipping={self.clipping!r}. Without clipping epsilon is infinite: pass noise_multiplier instead."
            )

    def make_clipping(self) -> Clipping:
        """Return the clipping object that ``clipping`` and ``max_grad_norm`` describe."""
        return make_clipping(self.clipping, self.max_grad_norm)

    @property
    def runs_samples_alone(self) -> bool:
        """True if every microbatch has one sample, so that plain autograd gives its gradient."""
        return self.microbatch_size == 1


def check_positions(positions: Sequence[int]) -> tuple[int, ...]:
    """Return ``public_optimizers`` as a tuple.

    Raises:
        TypeError: not a list of whole numbers.
        ValueError: a negative or repeated one.
    """
    if not isinstance(positions, Sequence):
        raise TypeError(
            f"Expected public_optimizers to be a list of positions, got public_optimizers={positions!r}. Pass [0] for the first "
            "optimizer that configure_optimizers returns."
        )
    advice = "Pass the place of each public optimizer in what configure_optimizers returns."
    return check.check_positions("public_optimizers", positions, advice)
