"""Tracked tensors: private parameters, and functions of them, that report every operation on them.

A private parameter becomes a tracked tensor by a change of its class: the object stays the same one, so that every
reference to it (tied layers, lists, optimizers) is followed. A function of private parameters is a tensor of its own
class that stays connected, by autograd, to stand-ins of its parameters.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

Region = tuple[int, torch.Size, tuple[int, ...]]
"""Offset, shape and strides of a view, in elements of its flattened parameter."""


class Node:
    """A private parameter or a function of private parameters, for which per-sample gradients are computed.

    Args:
        name: for messages.
        names: qualified names of the parameters that it is a function of.
        lineage: number of the sequence of operations that computed it; equal for equal operations on equal lineages.
        like: tensor with the shape of the node.
        region: index map of a view into its parameter; None for all other nodes.
        value: where its graph begins, as an operation and the number of its result, or the tensor while it has none;
            None for a tensor with the entries of its parameter.
        generation: number of the microbatch that computed it; -1 for a parameter.
    """

    __slots__ = (
        "_key",
        "dtype",
        "generation",
        "is_entrywise",
        "is_view",
        "lineage",
        "name",
        "names",
        "region",
        "shape",
        "value",
    )

    def __init__(
        self,
        name: str,
        names: tuple[str, ...],
        lineage: int,
        like: Tensor,
        region: Region | None = None,
        value: Tensor | tuple[Any, int] | None = None,
        generation: int = -1,
    ) -> None:
        self.name, self.names, self.lineage = name, names, lineage
        self.shape, self.dtype = like.shape, like.dtype
        self.region, self.value, self.generation = region, value, generation
        self.is_entrywise = region is None and value is None
        """Whether each entry is a function of the entries of parameters, of equal shape, at its own index."""
        self.is_view = region is not None or value is None
        """Whether the node is one parameter, or a view of one that holds no entry twice."""
        self._key: Hashable = names[0] if region is None else (names[0], region)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    @property
    def key(self) -> Hashable:
        """The parameter of the node, with the place of a view within it; the node itself if it is neither."""
        return (
            self._key if self.is_view else self
        )  # as an attribute, it would keep its graph until a garbage collection


class Reporting:
    """A mixin for the classes of tracked tensors; each tracker has its own, which report to its ``dispatch``."""

    __slots__ = ()

    tracker: ClassVar[Tracker]
    plain: ClassVar[type[Any]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = super().__deepcopy__(memo)  # type: ignore[misc]
        copied.__class__ = self.plain
        return copied


class Function(Reporting, Tensor):
    """A tracked tensor that is a function of private parameters."""

    node: Node
    began: Any
    """The ``grad_fn`` for which the tensor got its node."""
    repeated: tuple[Node, Tensor]
    """Its node, and the row that the tensor repeats; unset for other tensors."""


def is_tracked(thing: Any) -> bool:
    """Tell whether an object is a tracked private parameter or a function of such parameters."""
    return isinstance(thing, Reporting)


def reporting_class(plain: type[Any], tracker: Tracker) -> type[Any]:
    """Return the tracked variant of a tensor class, such as ``nn.Parameter``."""
    bases = (plain,) if issubclass(plain, Reporting) else (Reporting, plain)
    metaclass: Any = type(plain)
    reports = {"__torch_function__": staticmethod(tracker.dispatch)}
    made: type[Any] = metaclass(plain.__name__, bases, {"__slots__": (), "tracker": tracker, "plain": plain, **reports})
    return made


def region_of(view: Tensor, parameter: Tensor) -> Region | None:
    """Return the index map of a view into its parameter; None if the tensor is no view or repeats an entry.

    Example:
        >>> weight = torch.zeros(4, 3)
        >>> region_of(weight.t()[1:], weight)
        (1, torch.Size([2, 4]), (1, 3))
        >>> region_of(weight[:1].expand(2, 3), weight) is None
        True
    """
    if view.dtype != parameter.dtype or not parameter.is_contiguous() or view.numel() > parameter.numel():
        return None
    if view.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None
    span = 1
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride < span:
                return None
            span = stride * size
    return int(view.storage_offset() - parameter.storage_offset()), view.shape, view.stride()


def view_of(tensor: Tensor, region: Region | None) -> Tensor:
    """Return the part of a tensor that a region describes, as a view; the whole tensor if the region is None."""
    if region is None:
        return tensor
    offset, shape, strides = region
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def named(nodes: Iterable[Node]) -> str:
    """Return the names of nodes, for messages."""
    return ", ".join(repr(node.name) for node in nodes)
