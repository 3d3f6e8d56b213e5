"""Operations rewritten as simpler operations, which report themselves.

Each function takes the tracker, the torch function, and that function's arguments.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import is_view, unreported
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.nodes import Function, is_tracked
from lightning_dp.per_sample.owned import Rows

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracker import Tracker


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
    """Compute an instance norm with running statistics; weight and bias act on its result."""
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
    """Compute a batch norm with fixed statistics; weight and bias act on its result."""
    if training:
        raise PrivacyError(
            "Expected layers that keep samples apart, got batch_norm in training mode, which mixes them. "
            "lightning_dp.fix replaces it by a layer that works."
        )
    return scaled(F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps), weight, bias)


def matmul(tracker: Tracker, func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """Compute a product with a parameter as a linear layer, if its shape allows."""
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


def addmm(tracker: Tracker, func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Compute ``bias + a @ b`` as a linear layer, if its arguments allow."""
    if beta == alpha == 1 and bias.dim() == 1 and not is_tracked(a):
        return F.linear(a, b.mT, bias)
    return beta * bias + alpha * (a @ b)


def getitem(tracker: Tracker, func: Any, tensor: Any, index: Any) -> Any:
    """Select rows of a parameter by a tensor of indices, like an embedding."""
    one = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if isinstance(one, Tensor) and one.dtype in (torch.int64, torch.int32) and one.dim():
        return rows(tensor, one)
    return tracker.primitive(func, (tensor, index), {})


def index_select(tracker: Tracker, func: Any, input: Any, dim: int, index: Any) -> Any:
    """Select rows of a parameter, like an embedding."""
    if is_tracked(input) and dim == 0 and input.dim() and not is_tracked(index):
        return rows(input, index)
    return tracker.primitive(func, (input, dim, index), {})


def rows(table: Any, index: Tensor) -> Tensor:
    """Return rows of a table, by indices that may be negative."""
    flat = table.reshape(table.shape[0], -1)
    rows = F.embedding(index.long().remainder(len(table)), flat)
    return rows if table.dim() == 2 else rows.reshape(*index.shape, *table.shape[1:])


def setitem(tracker: Tracker, func: Any, tensor: Any, index: Any, value: Any) -> Any:
    """Write a function of parameters into a tensor of data, out of place if the index is a mask."""
    if is_tracked(tensor) or not is_tracked(value):
        return tracker.primitive(func, (tensor, index, value), {})
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        where = index.reshape(*index.shape, *[1] * (tensor.dim() - index.dim()))
        tensor.copy_(torch.where(where, value, tensor))
        return None
    target = tensor[index]
    if not is_view(target):
        return tracker.primitive(func, (tensor, index, value), {})
    target.copy_(value)
    return None


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


def embedding_of_weight(
    tracker: Tracker, func: Any, weight: Any, indices: Any, padding_idx: int = -1, *options: Any, **more: Any
) -> Any:
    """Compute an embedding whose weight is the first argument."""
    return F.embedding(indices, weight, padding_idx if padding_idx >= 0 else None)


def embedding_bag(
    tracker: Tracker,
    func: Any,
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Compute the sum, mean or maximum over the rows of each sample's bag."""
    if weight.dtype == torch.long:  # the old order
        input, weight = weight, input
    if input.dim() != 2:
        return _bags_by_offsets(
            tracker,
            input,
            weight,
            offsets,
            mode,
            per_sample_weights,
            include_last_offset,
            padding_idx,
            max_norm,
            scale_grad_by_freq,
        )
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    used = None if padding_idx is None else (input != padding_idx).unsqueeze(2)
    if mode == "max":
        if used is None:
            return rows.max(1).values
        return torch.where(used.any(1), rows.masked_fill(~used, -torch.inf).max(1).values, 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(2)
    if used is not None:
        rows = torch.where(used, rows, 0.0)
    total = rows.sum(1)
    if mode == "sum":
        return total
    return total / (input.shape[1] if used is None else used.sum(1).clamp_min(1))


def _bags_by_offsets(
    tracker: Tracker,
    input: Tensor,
    weight: Any,
    offsets: Tensor,
    mode: str,
    weights: Any,
    has_last: bool,
    padding_idx: int | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
) -> Any:
    """Return bags of unequal size; an entry belongs to the sample that owns its bag."""
    follower = tracker.follower
    if follower is None:
        raise PrivacyError(
            f"Expected bags whose samples are known, got input of shape {tuple(input.shape)} with offsets. The batch "
            f"must hold the offsets, one for each sample; {WAY_OUT}."
        )
    starts = offsets[:-1] if has_last else offsets
    bags = torch.searchsorted(starts, torch.arange(len(input), device=input.device), right=True) - 1
    num, width = len(starts), weight.shape[1]
    owners = follower.owners_of(starts)
    if isinstance(owners, Rows):
        entries = owners.index[bags] if owners.axis == 0 else owners.index.expand(len(input))
        follower.note(input, Rows(0, entries))
        follower.note(bags, Rows(0, entries))
    rows = F.embedding(input, weight, padding_idx, max_norm, 2.0, scale_grad_by_freq)
    used = rows.new_ones(len(input)) if padding_idx is None else (input != padding_idx).to(rows.dtype)
    if mode == "max":
        kept = rows.masked_fill((used == 0).unsqueeze(1), -torch.inf)
        top = rows.new_full((num, width), -torch.inf).scatter_reduce(0, bags.unsqueeze(1).expand_as(rows), kept, "amax")
        return top.masked_fill(top == -torch.inf, 0.0)
    scaled = rows * used.unsqueeze(1) if weights is None else rows * (used * weights).unsqueeze(1)
    total = rows.new_zeros(num, width).index_add(0, bags, scaled)
    if mode == "sum":
        return total
    return total / rows.new_zeros(num).index_add(0, bags, used).clamp_min(1).unsqueeze(1)


def lstm_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of an LSTM."""
    hidden, cell = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of a GRU."""
    r, z, n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return new + (z + hz).sigmoid() * (hx - new)


def rnn_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of a plain recurrent network."""
    total = F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)
    return total.tanh() if func.__name__ == "rnn_tanh_cell" else total.relu()


def bilinear(tracker: Tracker, func: Any, one: Any, other: Any, weight: Any, bias: Any = None) -> Any:
    """Compute a bilinear layer as a linear layer over the products of its inputs."""
    if is_tracked(one) or is_tracked(other):
        return tracker.primitive(func, (one, other, weight, bias), {})
    products = (one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2)
    return F.linear(products, weight.flatten(1), bias)


def watch(tracker: Tracker, func: Any, tensor: Any, *args: Any) -> Any:
    """Allow hooks on parameters, which see no gradient, and refuse hooks on functions of parameters, which would see
    raw ones.
    """
    if isinstance(tensor, Function):
        raise PrivacyError(
            f"Expected no hooks on functions of private parameters, got {func.__name__} on {tensor.node.name!r}: it "
            f"would see gradients that are not private. Register it on the output of the layer; {WAY_OUT}."
        )
    with unreported():
        return func(tensor, *args)


_BYPASS = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *tensors: False
)


def entered(func: Any) -> Any:
    """Return a Python function of ``torch.nn.functional`` that does not report itself; the functions that it
    calls do.
    """
    inside = FunctionType(
        func.__code__, {**func.__globals__, **_BYPASS}, func.__name__, func.__defaults__, func.__closure__
    )
    inside.__kwdefaults__ = func.__kwdefaults__
    return inside


def transposed(tracker: Tracker, func: Any, tensor: Any, *_: Any) -> Any:
    """Compute ``.T``, ``.mT``, ``.H``, ``.mH``, ``.real`` or ``.imag``."""
    name = func.__self__.__name__
    if name in ("real", "imag"):
        return tracker.primitive(getattr(torch, name), (tensor,), {})
    if name in ("T", "H") and tensor.dim() != 2:
        turned = tensor.permute(*range(tensor.dim() - 1, -1, -1))
    else:
        turned = tensor.transpose(-2, -1)
    return turned.conj() if name in ("H", "mH") and tensor.is_complex() else turned
