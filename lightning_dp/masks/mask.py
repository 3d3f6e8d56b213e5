"""The base class of masks, and the draw of a random set of coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


class GradientMask(ABC):
    """A rule that selects the active coordinates of each logical step, from public state only.

        g_i <- m g_i before clipping;  noise only where m = 1;  p.grad = 0 elsewhere

    **Guarantee**: a masked coordinate is zero for every possible sample, so it needs no noise, and the mask is known to
    everyone, so the ledger is the same as without it: no cost, and no amplification either. This holds only if the mask
    depends on public state alone (seeds, public weights, earlier noisy weights) and applies to a whole logical batch.
    """

    @abstractmethod
    def version(self, step: int) -> Hashable:
        """Return a key of the mask of a logical step: steps with equal keys have equal masks.

        Args:
            step: logical step of the whole run, >= 0.
        """

    @abstractmethod
    def live(self, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the mask of a logical step.

        Args:
            step: logical step of the whole run, >= 0.
            parameters: the private parameters by qualified name, in the module's order.

        Returns:
            name -> bool tensor of the parameter's shape, on its device, True where active. A parameter that is not
            named is active everywhere.
        """


def random_subset(size: int, count: int, entropy: Sequence[int]) -> NDArray[np.bool_]:
    """Draw ``count`` of ``size`` positions, uniformly without replacement.

    Positions are drawn with replacement until enough distinct ones are marked, never more at once than are missing, so
    every set of ``count`` positions is equally likely. If the complement of the set is smaller, the complement is
    drawn.

    **Guarantee**: the result depends on the arguments only; no global generator is used.

    Args:
        size: number of positions, >= 0.
        count: number of positions to draw, in [0, size].
        entropy: seed of the draw, as numbers >= 0.

    Returns:
        Shape ``(size,)``, True at the positions drawn. Public.

    Example:
        >>> int(random_subset(10, 3, (0, 1)).sum())
        3
    """
    assert 0 <= count <= size
    generator = np.random.default_rng(entropy)
    fewer, marked = min(count, size - count), 0
    chosen = np.zeros(size, dtype=np.bool_)
    while marked < fewer:
        chosen[generator.integers(size, size=fewer - marked)] = True
        marked = int(np.count_nonzero(chosen))
    return chosen if fewer == count else ~chosen
