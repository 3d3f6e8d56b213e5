"""Torch functions rewritten as simpler operations, each of which reports itself to tracked tensors.

Each function takes the tracker, the torch function, and that function's arguments.
"""

from __future__ import annotations

import math
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import is_mapped, unfollowed, unreported
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.nodes import Function, is_tracked, named

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


FEW = 2**17
"""Numbers of a product up to which one product with all groups costs less than the calls for each of them."""


def scaled(out: Tensor, weight: Any, bias: Any) -> Tensor:
    """Return ``out * weight + bias``, with one entry of weight and bias for each channel (axis 1)."""
    shape = (-1, *[1] * (out.dim() - 2))
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def instance_norm_of_running(
    tracker: Tracker,
    func: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *options: Any,
    **more: Any,
) -> Any:
    """Compute an instance norm with running statistics; apply weight and bias as separate operations."""
    return scaled(func(input, running_mean, running_var, None, None, *options, **more), weight, bias)


def batch_norm(
    tracker: Tracker,
    func: Any,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Compute a batch norm with fixed statistics; apply weight and bias as separate operations.

    In training mode only functions of parameters are normalised: some layers standardise their weights in this way.
    """
    if training and is_tracked(input):
        return tracker.primitive(func, (input, running_mean, running_var, weight, bias, True, momentum, eps), {})
    if training:
        raise PrivacyError(
            "Expected layers that keep samples apart, got batch_norm in training mode, which mixes them. "
            "lightning_dp.fix replaces it by a layer that works."
        )
    return scaled(F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps), weight, bias)


def matmul(tracker: Tracker, func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """Compute a matrix product with a parameter, as a linear layer if the shapes allow."""
    if func.__name__ == "__rmatmul__":
        a, b = b, a
    tracked = is_tracked(a), is_tracked(b)
    if not kwargs and tracked == (False, True) and a.dim() >= 2:
        if b.dim() == 2:
            return F.linear(a, b.mT)
        if b.dim() == 1:
            return F.linear(a, b.unsqueeze(0)).squeeze(-1)
    if not kwargs and tracked == (True, False) and b.dim() >= 2:
        if a.dim() == 2:
            return F.linear(b.mT, a).mT
        if a.dim() == 1:
            return F.linear(b.mT, a.unsqueeze(0)).squeeze(-1)
    return tracker.primitive(torch.matmul, (a, b), kwargs)


def tensordot(tracker: Tracker, func: Any, a: Any, b: Any, dims: Any = 2, out: Any = None) -> Any:
    """Sum over products with a parameter along several axes, as a linear layer."""
    if isinstance(dims, int):
        dims = range(a.dim() - dims, a.dim()), range(dims)
    if out is not None or isinstance(dims, Tensor) or is_tracked(a) == is_tracked(b):
        return tracker.primitive(func, (a, b), {"dims": dims, "out": out})
    sides = []
    for tensor, summed in zip((a, b), dims, strict=True):
        summed = [axis % tensor.dim() for axis in ([summed] if isinstance(summed, int) else summed)]
        kept = [axis for axis in range(tensor.dim()) if axis not in summed]
        sides.append((tensor, kept, summed, [tensor.shape[axis] for axis in summed]))
    if sides[0][3] != sides[1][3] or not sides[0][3] or not all(kept for _, kept, *_ in sides):
        return tracker.primitive(func, (a, b), {"dims": dims})
    (data, kept, summed, _), (weight, outer, inner, lengths) = sides[::-1] if is_tracked(a) else sides
    rows = data.permute(*kept, *summed).flatten(len(kept))
    made = F.linear(rows, weight.permute(*outer, *inner).reshape(-1, math.prod(lengths)))
    made = made.reshape(*made.shape[:-1], *(weight.shape[axis] for axis in outer))
    return made.movedim([*range(-len(outer), 0)], [*range(len(outer))]) if is_tracked(a) else made


def addmm(tracker: Tracker, func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Compute ``beta * bias + alpha * (a @ b)``, as a linear layer if the arguments allow."""
    if beta == alpha == 1 and bias.dim() == 1 and not is_tracked(a):
        return F.linear(a, b.mT, bias)
    return beta * bias + alpha * (a @ b)


def grouped_mm(
    tracker: Tracker, func: Any, a: Any, b: Any, *, offs: Any = None, bias: Any = None, **options: Any
) -> Any:
    """Multiply groups of rows by a matrix each, as linear layers if the samples of rows are followed: one layer for
    each group, or for few numbers one with all matrices, of whose result each row keeps the part of its group.
    """
    follower = tracker.follower
    rows_by_matrices = a.dim() == 2 and b.dim() == 3 and offs is not None and bias is None
    if follower is None or not rows_by_matrices or is_tracked(a) or any(options.values()):
        return tracker.primitive(func, (a, b), {"offs": offs, "bias": bias, **options})
    ends = offs.tolist()
    rest = a.shape[0] - (ends[-1] if ends else 0)
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    num, width = b.shape[0], b.shape[-1]
    matrices = b.mT
    if a.shape[0] * num * width <= FEW and matrices.is_contiguous() and min(*counts, rest) >= 0:
        with unfollowed():
            group = torch.searchsorted(offs, torch.arange(a.shape[0], dtype=offs.dtype, device=a.device), right=True)
            of_row = group[:, None] == torch.arange(num, device=a.device)
        follower.note(of_row, None)  # as the numbers in ``counts``
        products = F.linear(a, matrices.flatten(0, 1)).view(a.shape[0], num, width)
        return torch.where(of_row[:, :, None], products, 0.0).sum(1)
    groups = zip(a.split([*counts, rest]), matrices.unbind(), strict=False)
    made = [F.linear(rows, matrix) for rows, matrix in groups if rows.shape[0]]
    return torch.cat([*made, a.new_zeros(rest, b.shape[-1])] if rest or not made else made)


def getitem(tracker: Tracker, func: Any, tensor: Any, index: Any) -> Any:
    """Index a parameter; compute rows at integer indices as an embedding."""
    if isinstance(index, tuple) and is_tracked(tensor) and index and all(map(_is_index, index)):
        lead = tensor.shape[: len(index)]  # one entry of each leading axis: of one axis that holds them all
        tensor, parts = tensor.flatten(0, len(index) - 1), index
        index = torch.zeros((), dtype=torch.long, device=tensor.device)
        for size, part in zip(lead, parts, strict=True):
            index = index * size + part.long().remainder(size)
    if _is_index(index) and index.dim():
        return rows(tensor, index)
    if _is_index(index) and not is_mapped(index):
        index = int(tracker.recorder.noted("index", index))  # one entry for all rows: an expert that some chose
    return tracker.primitive(func, (tensor, index), {})


def _is_index(thing: Any) -> bool:
    return isinstance(thing, Tensor) and not is_tracked(thing) and thing.dtype in (torch.int64, torch.int32)


def index_select(tracker: Tracker, func: Any, input: Any, dim: int, index: Any) -> Any:
    """Select along an axis of a parameter; compute rows (axis 0) as an embedding."""
    if is_tracked(input) and dim == 0 and input.dim() and not is_tracked(index):
        return rows(input, index)
    return tracker.primitive(func, (input, dim, index), {})


def rows(table: Any, index: Tensor) -> Tensor:
    """Return the rows of a table at given indices, which may be negative."""
    flat = table.reshape(table.shape[0], -1)
    rows = F.embedding(index.long().remainder(len(table)), flat)
    return rows if table.dim() == 2 else rows.reshape(*index.shape, *table.shape[1:])


def like(tracker: Tracker, func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Give a tensor the type or shape of another one, of which nothing else is read."""
    other, name = args[0] if args else kwargs.get("other"), func.__name__
    if not isinstance(other, Tensor) or (name == "expand_as" and is_tracked(tensor) and is_tracked(other)):
        return tracker.primitive(func, (tensor, *args), kwargs)
    if name in ("to", "type_as"):
        return tensor.to(other.device, other.dtype, *args[1:])
    return getattr(tensor, name.removesuffix("_as"))(other.shape)


def broadcast_tensors(tracker: Tracker, func: Any, *tensors: Any) -> Any:
    """Expand tensors to their common shape."""
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    return tuple(tensor.expand(shape) for tensor in tensors)


def prelu(tracker: Tracker, func: Any, input: Any, weight: Any) -> Any:
    """Compute ``max(x, 0) + weight min(x, 0)``."""
    if is_tracked(input):
        return tracker.primitive(func, (input, weight), {})
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def bilinear(tracker: Tracker, func: Any, one: Any, other: Any, weight: Any, bias: Any = None) -> Any:
    """Compute a bilinear layer as a linear layer over the pairwise products of its two inputs."""
    if is_tracked(one) or is_tracked(other):
        return tracker.primitive(func, (one, other, weight, bias), {})
    products = (one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2)
    return F.linear(products, weight.flatten(1), bias)


def watch(tracker: Tracker, func: Any, tensor: Any, *args: Any) -> Any:
    """Run ``register_hook`` or ``retain_grad``; refuse it on functions of parameters, where it would expose raw
    gradients.
    """
    if isinstance(tensor, Function):
        raise PrivacyError(
            f"Expected no hooks on functions of private parameters, got {func.__name__} on {tensor.node.name!r}: it "
            f"would see gradients that are not private. Register it on the output of the layer; {WAY_OUT}."
        )
    with unreported():
        return func(tensor, *args)


def grad(tracker: Tracker, func: Any, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``torch.autograd.grad``; refuse it for private parameters, because the step would use raw gradients."""
    nodes = [node for tensor in tensors_in((inputs,), {}) if (node := tracker.node_of(tensor)) is not None]
    if nodes:
        raise PrivacyError(
            f"Expected gradients of data within a step, got those of {named(nodes)}. Steps that compute with gradients "
            "of weights, as inner loops of meta-learning do, need second derivatives, which only grad_sample='single' "
            "supports."
        )
    return tracker.primitive(func, (outputs, inputs, *args), kwargs)


_BYPASS = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *tensors: False
)


def entered(func: Any) -> Any:
    """Return a Python function of ``torch.nn.functional`` that does not report itself, only what it calls.

    So do the functions that it chooses from, as ``max_pool1d`` does between those with and without indices.
    """
    closure = None if func.__closure__ is None else tuple(map(_entered_cell, func.__closure__))
    inside = FunctionType(func.__code__, {**func.__globals__, **_BYPASS}, func.__name__, func.__defaults__, closure)
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


def _entered_cell(cell: CellType) -> CellType:
    held = cell.cell_contents
    return CellType(entered(held)) if isinstance(held, FunctionType) else cell


def sized(tracker: Tracker, func: Any, tensor: Any, *sizes: Any, **kwargs: Any) -> Any:
    """Expand or repeat a parameter; a size that a tensor holds is a number, as if it had been read before."""
    numbers = [int(size) if isinstance(size, Tensor) else size for size in sizes]
    return tracker.primitive(func, (tensor, *numbers), kwargs)


def transposed(tracker: Tracker, func: Any, tensor: Any, *_: Any) -> Any:
    """Compute ``.T``, ``.mT``, ``.H``, ``.mH``, ``.real`` or ``.imag``."""
    name = func.__self__.__name__
    if name in ("real", "imag"):
        return tracker.primitive(getattr(torch, name), (tensor,), {})
    reverses = name in ("T", "H") and tensor.dim() != 2
    turned = tensor.permute(*range(tensor.dim() - 1, -1, -1)) if reverses else tensor.transpose(-2, -1)
    return turned.conj() if name in ("H", "mH") and tensor.is_complex() else turned
