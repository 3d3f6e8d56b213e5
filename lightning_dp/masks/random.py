"""Random sparsification: a random set of coordinates is masked, and drawn again at each refresh."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.masks.mask import GradientMask, random_subset

#: From the progress of a run, in [0, 1], to the fraction of the final rate, in [0, 1].
Cooling = Callable[[float], float]


def linear(progress: float) -> float:
    """Return the fraction of the final rate at this progress: it rises linearly from 0 to 1."""
    return progress


def cosine(progress: float) -> float:
    """Return the fraction of the final rate at this progress: it rises along half a cosine from 0 to 1."""
    return (1 - math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """Return the fraction of the final rate, which is 1 from the first step on."""
    return 1.0


COOLINGS: dict[str, Cooling] = {"linear": linear, "cosine": cosine, "constant": constant}


class RandomMask(GradientMask):
    """A mask of a random set of coordinates, drawn again every ``refresh_steps`` logical steps.

        i = step // refresh_steps,   r(i) = final_rate * schedule(min(i / (num_refreshes - 1), 1)),   Z = int(r(i) P)

    Of the P coordinates of all private parameters, biases included, Z are masked, drawn uniformly without replacement
    at every refresh. After the planned refreshes the rate stays constant. With one refresh, progress is 1 throughout.

    **Guarantee**: a mask depends on (seed, i) and on the parameters' shapes only, so it is the same on all ranks and
    devices and in a resumed run. No global generator is used. The seed is public, and so are the masks.

    Args:
        final_rate: fraction r* of coordinates masked in the end, in [0, 1).
        schedule: "linear", "cosine", "constant", or a callable from the progress in [0, 1] to a fraction of r* in [0,
            1].
        refresh_steps: number of logical steps that share a mask, >= 1.
        num_refreshes: number of refreshes of the whole run (F E), >= 1; the last one has progress 1.
        scope: "global" draws Z of all coordinates; "layer" draws int(r P_l) in each parameter tensor.
        seed: whole number >= 0.

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    Example:
        >>> mask = RandomMask(0.5, refresh_steps=10, num_refreshes=3)
        >>> [mask.rate(step) for step in (0, 10, 20, 99)]
        [0.0, 0.25, 0.5, 0.5]

    References:
        Zhu & Blaschko 2023, Improving Differentially Private SGD via Randomly Sparsified Gradients, TMLR, Algorithm 1.
    """

    def __init__(
        self,
        final_rate: float,
        *,
        schedule: str | Cooling = "linear",
        refresh_steps: int,
        num_refreshes: int,
        scope: str = "global",
        seed: int = 0,
    ) -> None:
        self.final_rate = check_rate(final_rate)
        self.schedule = check_cooling(schedule)
        self.refresh_steps = check.check_count("refresh_steps", refresh_steps)
        self.num_refreshes = check.check_count("num_refreshes", num_refreshes)
        self.scope = check.check_choice("scope", scope, ("global", "layer"))
        self.seed = check_seed(seed)
        self.realized_rate = 0.0  # of the last call of `live`

    def rate(self, step: int) -> float:
        """Return the fraction of coordinates that the schedule masks in a logical step."""
        refresh = step // self.refresh_steps
        progress = 1.0 if self.num_refreshes == 1 else min(refresh / (self.num_refreshes - 1), 1.0)
        fraction = float(self.schedule(progress))
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"Expected a schedule with values in [0, 1], got {fraction} at progress={progress:g}. It scales "
                "final_rate: return a fraction of it."
            )
        return self.final_rate * fraction

    @override
    def version(self, step: int) -> Hashable:
        """Return the index of the step's refresh, or -1 if its rate is 0."""
        return step // self.refresh_steps if self.rate(step) > 0 else -1

    @override
    def live(self, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Draw the mask of a logical step on the CPU, and move it to the parameters' devices."""
        rate, entropy = self.rate(step), (self.seed, step // self.refresh_steps)
        sizes = [parameter.numel() for parameter in parameters.values()]
        total = sum(sizes)
        if self.scope == "global":
            counts = [int(rate * total)]
            masked = torch.split(torch.from_numpy(random_subset(total, counts[0], entropy)), sizes)
        else:
            counts = [int(rate * size) for size in sizes]
            draws = zip(sizes, counts, strict=True)
            masked = tuple(
                torch.from_numpy(random_subset(size, count, (*entropy, layer)))
                for layer, (size, count) in enumerate(draws)
            )
        self.realized_rate = sum(counts) / total if total else 0.0
        if not sum(counts):
            return {}
        return {
            name: part.logical_not().view(parameter.shape).to(parameter.device)
            for (name, parameter), part in zip(parameters.items(), masked, strict=True)
        }


def check_rate(final_rate: float) -> float:
    """Check that ``0 <= final_rate < 1``; 0 masks nothing."""
    if not 0 <= check.check_number("final_rate", final_rate) < 1:
        raise ValueError(
            f"Expected 0 <= final_rate < 1, got final_rate={final_rate}. It is the fraction of coordinates left out in "
            "the end."
        )
    return float(final_rate)


def check_cooling(schedule: str | Cooling) -> Cooling:
    """Return the schedule with this name, or the user's own function unchanged."""
    if callable(schedule):
        return schedule
    return COOLINGS[check.check_choice("schedule", schedule, COOLINGS)]


def check_seed(seed: int) -> int:
    """Check that a seed is a whole number of at least zero."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"Expected seed to be a whole number, got seed={seed!r}. Pass 0 or above: the mask is public.")
    if seed < 0:
        raise ValueError(f"Expected seed >= 0, got seed={seed}. Pass 0 or above: the mask is public.")
    return seed
