"""Watch of gradients after their release, which user code may change before the optimizer steps on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.system.torch_private import num_changes


class Gradients:
    """The private gradients of a release.

    Args:
        optimizer: it steps on them.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with unfollowed():
            self._before = self._look()

    def _look(self) -> tuple[list[Any], list[int]]:
        grads = [each.grad for each in self._parameters]
        # all of one dtype are views of one buffer, and count its changes together
        return grads, [-1 if each is None else num_changes(each) for each in (*grads[:1], *grads[-1:])]

    def writes(self) -> Iterator[tuple[Any, ...]]:
        """Yield a key for gradients that were changed in place since, and for each that was replaced."""
        with unfollowed():
            grads, changes = self._look()
        before, counted = self._before
        for index, (one, other) in enumerate(zip(before, grads, strict=True)):
            if other is not None and one is not other:
                yield "another gradient", index
        yield from (("gradients", now - then) for then, now in zip(counted, changes, strict=True) if now > then)
