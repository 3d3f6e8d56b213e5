"""Equal functions of parameters within a microbatch: loops over time compute the same function in each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import in_backward
from lightning_dp.per_sample.tracking.nodes import Function, Node
from lightning_dp.per_sample.tracking.operations import ENTRYWISE
from lightning_dp.system.torch_private import num_changes

MOST_NUMBERS = 2**12
"""Numbers of a function up to which a comparison costs less than another pull-back."""


class Sharing:
    """Functions of parameters of a microbatch, of which equal ones get one node: its gradients are pulled back once.

    **Guarantee**: functions share a node only if they come from one operation without randomness on the same nodes and
    numbers, if no parameter was changed between, and if their values are equal.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[Tensor, list[Any], Node]] = {}
        self._seen: set[int] = set()
        self._repeated: set[int] = set()  # of all microbatches

    def clear(self) -> None:
        """Forget the functions of a microbatch."""
        self._first, self._seen = {}, set()

    def share(self, func: Any, args: Any, made: Function, tracked: Sequence[tuple[Tensor, Node]]) -> None:
        """Give a function the node of an equal one before it, if it is small.

        Args:
            func: the operation.
            args: its arguments.
            made: its result.
            tracked: tensors of the arguments, with their nodes.
        """
        lineage = made.node.lineage
        if lineage not in self._repeated:  # no microbatch computed it twice
            (self._repeated if lineage in self._seen else self._seen).add(lineage)
            return
        if func.__name__ not in ENTRYWISE or made.numel() > MOST_NUMBERS or in_backward():
            return
        if made.device.type != "cpu":  # a comparison would wait for the device
            return
        given = [None if isinstance(one, Tensor) else one for one in args]
        given += [(node.key, num_changes(one), node.is_view and one.data_ptr()) for one, node in tracked]
        first, before, node = self._first.setdefault(lineage, (made, given, made.node))
        if node is not made.node and before == given and torch.equal(first, made):
            made.node = node
