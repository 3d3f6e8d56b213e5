"""The layout of a call: batch axis and rows of one sample, inferred from two batch sizes.

Legend: ``B`` samples, ``K`` rows of one sample, "sample-major": the ``K`` rows of a sample are next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.errors import PrivacyError

WAY_OUT = "grad_sample='single' works for any module"
CUSTOM = "the torch.autograd.Function"
TWICE = "got create_graph=True through"
HIDDEN = "a call within torch.vmap, forward-mode AD or another transform of torch.func, which hides them"
PENALTY = "Add a penalty on weights to the loss of each sample before their mean, or use the optimizer's weight_decay"
#: Part of a message: no run that learned the layout saw such a use.
UNLEARNED = "in a way that was learned"
#: Part of a message: the step sorts its records.
REORDERED = "those of the records in another order"
#: Parts of messages: records that were seen first had the same number of rows, took the same branches, or kept their
#: order, by chance.
MISLED = ("row(s) for each of", UNLEARNED, REORDERED)


@dataclass(frozen=True)
class BatchAxis:
    """The axis of a tensor that runs over the samples.

    Args:
        axis: position of the axis.
        multiplicity: ``K``, its length per sample when it was learned. More than one for folded time steps or views.
        sample_major: whether the ``K`` rows of a sample are neighbours; ``None`` if ``K = 1``.
        is_pinned: whether ``K`` must keep its learned value, because nothing shows that another value would be common
            to all samples.
    """

    axis: int
    multiplicity: int = 1
    sample_major: bool | None = None
    is_pinned: bool = field(default=False, compare=False)

    def set_order(self, sample_major: bool) -> None:
        """Say whether the rows of a sample are neighbours, once that is seen."""
        object.__setattr__(self, "sample_major", sample_major)

    def pin(self) -> None:
        """Require from here on that ``K`` is what it was when it was learned."""
        object.__setattr__(self, "is_pinned", self.multiplicity > 1)

    def rows_of_one(self, tensor: Tensor, batch_size: int, where: object) -> int:
        """Return ``K``, the rows per sample of a tensor; raise PrivacyError if samples cannot be distinguished."""
        if tensor.dim() <= self.axis:
            raise PrivacyError(
                f"Expected a tensor with the batch in axis {self.axis}, got shape={tuple(tensor.shape)} in {where}. "
                f"The layer is used in a way that was not seen when its layout was learned; {WAY_OUT}."
            )
        length = tensor.shape[self.axis]
        return 1 if length == batch_size and self.multiplicity == 1 else self.rows_in(length, batch_size, where)

    def rows_in(self, length: int, batch_size: int, where: object) -> int:
        """Return ``K`` for an axis of this length; raise PrivacyError if samples cannot be distinguished."""
        if batch_size == 0:
            return self.multiplicity
        rows, rest = divmod(length, batch_size)
        changed = (self.multiplicity == 1 and batch_size != 1) or self.is_pinned
        if rest or rows == 0 or (changed and rows != self.multiplicity):
            raise PrivacyError(
                f"Expected axis {self.axis} to hold {self.multiplicity} row(s) for each of {batch_size} samples, "
                f"got length={length} in {where}. Each sample must own the same number of rows; {WAY_OUT}."
            )
        return rows

    def to_front(self, tensor: Tensor, batch_size: int, where: object) -> tuple[Tensor, int]:
        """Return the tensor with its batch axis first and its rows sample-major, and ``K``."""
        rows = self.rows_of_one(tensor, batch_size, where)
        if self.axis:
            tensor = tensor.movedim(self.axis, 0)
        if rows > 1 and batch_size > 1 and not self.sample_major:
            shape = tensor.shape
            tensor = tensor.reshape(rows, batch_size, *shape[1:]).transpose(0, 1).reshape(shape)
        return tensor, rows

    def from_front(self, tensor: Tensor) -> Tensor:
        """Fold a tensor ``(B, K, ...)`` back to the original batch axis and row order."""
        if tensor.shape[1] > 1 and not self.sample_major:
            tensor = tensor.transpose(0, 1)
        return tensor.flatten(0, 1).movedim(0, self.axis)


@dataclass(frozen=True)
class Unclear:
    """A tensor or call whose batch axis could not be learned, why, and the way out."""

    reason: str
    way_out: str = f"Give it one batch axis; {WAY_OUT}."


Axis = BatchAxis | Unclear | None
"""``None``: the tensor carries no batch axis."""


@dataclass(frozen=True)
class CallLayout:
    """The axes of one call: one entry for each tensor of its arguments and of its output."""

    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]

    def agrees(self, other: CallLayout) -> bool:
        """Tell whether two layouts have the same axes; multiplicities above one may differ."""

        def same(a: Axis, b: Axis) -> bool:
            if isinstance(a, BatchAxis) and isinstance(b, BatchAxis):
                order = a.sample_major == b.sample_major
                return a.axis == b.axis and order and (a.multiplicity == 1) == (b.multiplicity == 1)
            return a == b

        mine, theirs = self.inputs + self.outputs, other.inputs + other.outputs
        return len(self.inputs) == len(other.inputs) and len(mine) == len(theirs) and all(map(same, mine, theirs))

    @property
    def unordered(self) -> list[BatchAxis]:
        """Axes with several rows of each sample, of which the order is not known."""
        axes = (axis for axis in (*self.inputs, *self.outputs) if isinstance(axis, BatchAxis))
        return [axis for axis in axes if axis.multiplicity > 1 and axis.sample_major is None]


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments or outputs in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Observation:
    """One call seen while the layout is inferred."""

    inputs: list[Tensor]
    input_shapes: list[torch.Size]
    output_shapes: list[torch.Size]
    with_grad: bool
    parent: Any = None
    on_other_values: Callable[[], list[Tensor]] | None = None
    """Runs an operation on parameters alone with other values, so that equal entries are no accident of theirs."""
    meets_others: bool = False
    meets_gradient: bool = False
    like: Tensor | None = None


Key = TypeVar("Key", bound=Hashable)


def solve(
    first: Mapping[Key, list[Observation]], second: Mapping[Key, list[Observation]], sizes: tuple[int, int]
) -> dict[Key, list[CallLayout] | Unclear]:
    """Infer the layout of every call, by operation, from its shapes and values at two batch sizes.

    Args:
        first: calls seen at ``sizes[0]``.
        second: calls seen at ``sizes[1]``; the first ``sizes[0]`` samples are the same as in ``first``.
        sizes: two different numbers of samples.

    Returns:
        Operation to the layouts of its calls in order, or to the reason why they are unclear.
    """
    layouts: dict[Key, list[CallLayout] | Unclear] = {}
    for name in first.keys() | second.keys():
        calls, others = first.get(name, []), second.get(name, [])
        if len(calls) != len(others):
            layouts[name] = Unclear(
                f"it was called {len(calls)} times with {sizes[0]} samples and {len(others)} times with {sizes[1]}"
            )
            continue
        layouts[name] = [_solve_call(a, b, sizes) for a, b in zip(calls, others, strict=True)]
    return layouts


def _solve_call(first: Observation, second: Observation, sizes: tuple[int, int]) -> CallLayout:
    shapes = (first.input_shapes, second.input_shapes), (first.output_shapes, second.output_shapes)
    if any(len(a) != len(b) for a, b in shapes):
        unclear = Unclear("the number of its tensors changes with the batch size")
        return CallLayout((unclear,), (unclear,))
    inputs = [solve_axis(a, b, sizes) for a, b in zip(*shapes[0], strict=True)]
    outputs = [solve_axis(a, b, sizes) for a, b in zip(*shapes[1], strict=True)]
    for i, axis in enumerate(inputs):
        if isinstance(axis, BatchAxis) and axis.multiplicity > 1:
            order = _row_order(first.inputs[i], second.inputs[i], axis, sizes)
            inputs[i] = BatchAxis(axis.axis, axis.multiplicity, order)
    known = {a.sample_major for a in inputs if isinstance(a, BatchAxis) and a.sample_major is not None}
    if not known and first.like is not None and second.like is not None:
        like = solve_axis(first.like.shape, second.like.shape, sizes)
        if isinstance(like, BatchAxis) and like.multiplicity > 1:
            known = {order for order in [_row_order(first.like, second.like, like, sizes)] if order is not None}
    if len(known) == 1:
        # output rows have the order of the input rows that they come from
        order = known.pop()
        inputs = [_with_order(axis, order) for axis in inputs]
        outputs = [_with_order(axis, order) for axis in outputs]
    return CallLayout(tuple(inputs), tuple(outputs))


def solve_axis(a: torch.Size, b: torch.Size, sizes: tuple[int, int]) -> Axis:
    """Return the axis whose length changes with the batch size, given a tensor's shapes at two sizes; None if none
    does.
    """
    if len(a) != len(b):
        return Unclear(f"its shape goes from {tuple(a)} to {tuple(b)} with the batch size")
    changed = [i for i in range(len(a)) if a[i] != b[i]]
    if not changed:
        return None
    if len(changed) > 1:
        reason = f"two axes change with the batch size: {tuple(a)} to {tuple(b)}"
        if all((a[i], b[i]) == sizes for i in changed):
            return Unclear(
                f"{reason}, so each sample meets all others, as in a contrastive loss",
                "No bound for one sample exists there: give each record negatives of its own.",
            )
        return Unclear(reason)
    axis = changed[0]
    rows, rest = divmod(a[axis], sizes[0])
    if rest or rows * sizes[1] != b[axis] or rows == 0:
        return Unclear(
            f"its axis {axis} is no multiple of the batch size: {a[axis]} of {sizes[0]}, {b[axis]} of {sizes[1]}"
        )
    return BatchAxis(axis, rows)


def _with_order(axis: Axis, order: bool | None) -> Axis:
    if isinstance(axis, BatchAxis) and axis.multiplicity > 1 and axis.sample_major is None:
        return BatchAxis(axis.axis, axis.multiplicity, order)
    return axis


def _row_order(first: Tensor, second: Tensor, axis: BatchAxis, sizes: tuple[int, int]) -> bool | None:
    """Return whether rows are sample-major, judged by the rows of samples that both runs share; None if unclear."""
    shared, rows = min(sizes), axis.multiplicity
    a, b = (
        (t.detach().movedim(axis.axis, 0) if not t.is_floating_point() else t.detach().float().movedim(axis.axis, 0))
        for t in (first, second)
    )

    def difference(sample_major: bool) -> float:
        views = []
        for tensor, size in ((a, sizes[0]), (b, sizes[1])):
            if sample_major:
                views.append(tensor.reshape(size, rows, *tensor.shape[1:])[:shared])
            else:
                views.append(tensor.reshape(rows, size, *tensor.shape[1:])[:, :shared].transpose(0, 1))
        return float((views[0].double() - views[1].double()).abs().mean()) if views[0].numel() else 0.0

    scale = float(a.double().abs().mean()) if a.numel() else 0.0
    by_sample, by_row = difference(True), difference(False)
    close = [one <= 1e-2 * scale for one in (by_sample, by_row)]
    if not any(close) or (all(close) and max(by_sample, by_row) <= 100 * min(by_sample, by_row)):
        return None
    return by_sample < by_row
