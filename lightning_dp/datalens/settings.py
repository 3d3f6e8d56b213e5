"""The arguments of ``DataLens``, validated once and frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dp import _validate as check
from lightning_dp.datalens.votes import SIGNS


@dataclass(frozen=True, kw_only=True)
class DataLensSettings:
    """The user's settings; ``DataLens`` documents every field."""

    num_teachers: int
    top_k: int
    sigma: float | None = None
    threshold: float = 0.0
    target_epsilon: float | None = None
    target_delta: float | None = None
    z_dim: int = 50
    num_classes: int = 1
    batch_size: int = 30
    alpha: float = 1e-3
    lr: float = 1e-3
    teacher_lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    d_steps: int = 2
    pretrain_steps: int = 10
    signs: str = "sign"
    teacher_batch_size: int = 30
    teacher_chunk_size: int = 512
    accountant: str = "gdp"
    public_seed: int = 0
    secure_rng: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check all arguments but ``accountant``, which ``make_accountant`` checks."""
        if (self.sigma is None) == (self.target_epsilon is None):
            raise ValueError(
                f"Expected exactly one of sigma and target_epsilon, got sigma={self.sigma!r} and "
                f"target_epsilon={self.target_epsilon!r}. Pass the noise, or the epsilon it should be calibrated to."
            )
        if self.sigma is not None:
            check.check_nonnegative("sigma", self.sigma, "0 is legal and means an infinite epsilon.")
        if self.target_epsilon is not None:
            check.check_positive("target_epsilon", self.target_epsilon)
        if self.target_delta is not None:
            check.check_probability("target_delta", self.target_delta, "Pass less than one over the number of records.")
        counts = ("num_teachers", "top_k", "z_dim", "num_classes", "batch_size", "d_steps", "teacher_batch_size")
        for name in (*counts, "teacher_chunk_size"):
            check.check_count(name, getattr(self, name))
        for name in ("alpha", "lr", "teacher_lr"):
            check.check_positive(name, getattr(self, name))
        if not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(
                f"Expected two betas in [0, 1), got betas={self.betas!r}. They are those of Adam, for example (0.5, "
                "0.999)."
            )
        if not 0 <= check.check_number("threshold", self.threshold) < 1:
            raise ValueError(
                f"Expected 0 <= threshold < 1, got threshold={self.threshold!r}. It is a fraction of the teachers; "
                "their votes alone never exceed all of them."
            )
        check.check_choice("signs", self.signs, SIGNS)
        check.check_flag("secure_rng", self.secure_rng)
        for name in ("pretrain_steps", "public_seed", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < math.inf:
                raise ValueError(f"Expected {name} to be a whole number >= 0, got {name}={value!r}. Pass 0 or above.")
        if self.seed is not None and self.secure_rng:
            raise ValueError(
                f"Expected secure_rng=True without a seed, got seed={self.seed!r}. A seed makes the noise predictable; "
                "drop one."
            )
