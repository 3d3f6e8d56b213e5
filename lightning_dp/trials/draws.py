"""Random draws of a trial run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.per_sample.frozen_randomness import REJECTING, FrozenRandomness
from lightning_dp.sandbox.randomness import seed_generators, seed_low_or_high

#: Quantiles of the coins of a batch: a branch that is taken with a probability of 0.1 or of 0.9 is tried.
LOW, MIDDLE, HIGH = 0.02, 0.5, 0.98
#: Seed of trial runs, which user code is not likely to set itself.
_FIRST_SEED = 0x5EED_7E57_5EED


@dataclass(frozen=True)
class Draws:
    """The random draws of one trial run: unless ``real``, torch's are frozen (``FrozenRandomness``); the others follow
    a seed.

    Args:
        seed: of the global generators.
        coin: quantile of uniform draws; also of the first draws of numpy and Python unless it is ``MIDDLE``.
        by_place: each entry of a drawn tensor has a value of its own.
        real: torch draws as it does in training, but for draws that shift all later random numbers by
            how many they take, which depends on the values of one sample and changes no distribution.
        moved: number of a small change of all private parameters; 0 for none.
        far: whether all private parameters are far from their values, so that couplings that these hide show.
        rates: whether rates of dropout and Bernoulli draws show.
        by_content: with ``real``, dropout drops entries by their values, so that the order of the rows changes nothing.
        by_copy: with ``by_place``, rows of a drawn tensor are those of all samples several times, one after the other.
    """

    seed: int = 0
    coin: float = MIDDLE
    by_place: bool = False
    real: bool = False
    moved: int = 0
    far: bool = False
    rates: bool = False
    by_content: bool = False
    by_copy: bool = False

    def begin(self, size: int, *, by_column: bool = False) -> FrozenRandomness:
        """Seed the global generators; return the mode that freezes torch's draws for ``size`` samples while entered.

        Args:
            size: number of samples.
            by_column: whether draws that would be equal in all entries differ along their last axis.
        """
        seed_generators(_FIRST_SEED + self.seed)
        if self.coin != MIDDLE:
            seed_low_or_high(high=self.coin > MIDDLE)
        if self.real:
            return FrozenRandomness(by_place=True, only=REJECTING, by_content=self.by_content)
        block = size if self.by_copy else 0
        options = {"rates": self.rates, "block": block, "by_column": by_column and not self.by_place}
        return FrozenRandomness(by_place=self.by_place, coin=self.coin, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def move(self, parameters: Iterable[Tensor]) -> None:
        """Change each entry of parameters by at most a thousandth, by each number in another way; far away, double it
        and add up to a tenth.
        """
        for parameter in parameters:
            places = torch.arange(parameter.numel(), device=parameter.device, dtype=torch.float32)
            wave = (places * (self.moved + 0.7)).sin().view(parameter.shape).to(parameter.dtype)
            parameter.mul_(2.0 if self.far else 1.0 + 1e-3 * wave).add_(wave, alpha=0.1 if self.far else 0.0)
