"""Owners of the result of an operation, computed from the owners of its arguments.

An operation that is not listed has a result of unknown owners, unless all it was given belongs to one sample. So a
missing entry costs speed (another way to per-sample gradients is taken), never a guarantee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dp.per_sample.arguments import replaced, tensors_in
from lightning_dp.per_sample.operations import ALIGNED, SAME_ENTRIES
from lightning_dp.per_sample.owned import MIXED, NOBODY, Mixed, Owners, Rows, compressed, merged

_UNARY = """
    relu relu6 gelu sigmoid tanh exp exp2 expm1 log log1p log2 log10 sqrt rsqrt abs absolute neg negative sin cos tan
    erf erfc silu mish softplus elu selu celu leaky_relu hardtanh hardswish hardsigmoid logsigmoid log_sigmoid square
    reciprocal logical_not logical_and logical_or logical_xor bitwise_not isnan isinf isfinite nan_to_num round floor
    ceil trunc frac sign sgn dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout bernoulli logit
    long int bool detach threshold hardshrink softshrink tanhshrink rrelu lgamma digamma invert __invert__ __neg__
    __abs__ __pos__ tril triu cpu cuda requires_grad_ data real imag prelu
"""
_MOVES = """
    __getitem__ index_select gather take take_along_dim cat concat concatenate stack hstack vstack split
    split_with_sizes tensor_split chunk unsafe_chunk unsafe_split unbind narrow select transpose swapaxes swapdims
    movedim moveaxis permute t T mT H mH adjoint view reshape flatten unflatten ravel squeeze unsqueeze expand repeat
    repeat_interleave tile broadcast_to flip fliplr flipud roll rot90 diagonal unfold masked_select expand_as view_as
    reshape_as select_scatter _pack_padded_sequence _pad_packed_sequence
"""
_PICKS = """
    __getitem__ index_select gather take take_along_dim repeat_interleave masked_select _pack_padded_sequence
    _pad_packed_sequence
"""
_REDUCES = """
    sum nansum mean nanmean amax amin prod logsumexp softmax log_softmax cumsum cumprod cummax cummin logcumsumexp any
    all argmax argmin sort argsort median nanmedian var std count_nonzero max min var_mean std_mean aminmax
"""
_REDUCES_SECOND = "norm vector_norm linalg_norm linalg_vector_norm topk kthvalue"
_IMAGES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d group_norm instance_norm batch_norm upsample_nearest1d upsample_nearest2d upsample_bilinear2d
    pixel_shuffle pixel_unshuffle glu
"""
_MAKES_CONSTANTS = """
    zeros_like ones_like rand_like randn_like randint_like empty_like new_zeros new_ones new_empty zero_ arange zeros
    ones empty eye linspace logspace rand randn randint randperm tril_indices triu_indices normal uniform_ normal_
    hann_window hamming_window full new_full full_like
"""

_REDUCING = {**dict.fromkeys(_REDUCES.split(), 1), **dict.fromkeys(_REDUCES_SECOND.split(), 2)}
"""Names of operations that compute over some axes, with the position of the argument that names these."""

_LAST_AXIS = frozenset(("sort", "argsort", "topk", "kthvalue"))
_ADDING = frozenset(("scatter_add", "index_add", "scatter_reduce", "index_reduce", "scatter", "index_copy"))
CONSTANTS = frozenset(_MAKES_CONSTANTS.split())
"""Names of operations whose result holds no data."""


class Step(NamedTuple):
    """One operation that has run.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: the same, by name.
        out: its result.
        owned: tensors that hold data, with their owners.
        identity: ``0 ... B - 1``.
        known: indices that the batch holds.
    """

    func: Any
    args: Any
    kwargs: Any
    out: Any
    owned: list[tuple[Tensor, Rows]]
    identity: Tensor
    known: Sequence[Tensor]


Found = Owners | list[Owners]


def _entry_by_entry(step: Step) -> Found:
    return merged([(tensor.dim(), rows) for tensor, rows in step.owned], _first(step.out).dim())


def _first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def _alone(step: Step) -> tuple[Tensor, Rows] | None:
    """Return the only tensor with data, and its owners; None if there are several."""
    return step.owned[0] if len(step.owned) == 1 else None


def _reduced(step: Step) -> Found:
    """Return the owners after a reduction: unchanged if the reduced axes do not include theirs."""
    name = step.func.__name__.rstrip("_")
    if len(step.owned) > 1 or (len(step.args) > 1 and isinstance(step.args[1], Tensor)):
        return _entry_by_entry(step)
    tensor, rows = step.owned[0]
    at = _REDUCING[name]
    default = -1 if name in _LAST_AXIS else None
    over = step.kwargs.get("dim", step.kwargs.get("axis", step.args[at] if len(step.args) > at else default))
    named = () if over is None or isinstance(over, bool) else (over,) if isinstance(over, int) else tuple(over)
    axes = {axis % max(1, tensor.dim()) for axis in named or range(tensor.dim())}
    if rows.axis is None:
        return rows
    if rows.axis in axes and name in ("sort", "argsort") and tensor.dim() == 1:
        order = step.out if name == "argsort" else step.out[1]
        return Rows(0, rows.index[order])
    if rows.axis in axes:
        top = rows.index.max() if rows.index.numel() else rows.index.new_tensor(NOBODY)
        same = bool(((rows.index == top) | (rows.index == NOBODY)).all())
        return Rows(None, top.reshape(1)) if same and int(top) != NOBODY else MIXED
    keeps = _first(step.out).dim() == tensor.dim()
    return rows.moved(rows.axis if keeps else rows.axis - sum(axis < rows.axis for axis in axes))


def _linear(step: Step) -> Found:
    found = _alone(step)
    if found is None or found[0] is not step.args[0]:
        return MIXED
    tensor, rows = found
    return rows if rows.axis is not None and rows.axis < tensor.dim() - 1 else MIXED


def _matmul(step: Step) -> Found:
    left, right = (step.args[1], step.args[0]) if step.func.__name__ == "__rmatmul__" else step.args[:2]
    num_axes, aligned = _first(step.out).dim(), []
    for tensor, rows in step.owned:
        assert rows.axis is not None
        is_left, axes = tensor is left, tensor.dim()
        if tensor is left and tensor is right:
            return MIXED
        summed = axes - 1 if is_left or axes == 1 else axes - 2
        if rows.axis == summed:
            return MIXED
        lost = 1 if (right if is_left else left).dim() == 1 else 0  # the other one's vector has no axis in the result
        if not is_left and lost and rows.axis == axes - 1:
            aligned.append(rows.moved(num_axes - 1))
        else:
            aligned.append(rows.moved(num_axes + (lost if is_left or rows.axis < axes - 2 else 0) - axes + rows.axis))
    return merged([(num_axes, rows) for rows in aligned], num_axes)


def _einsum(step: Step) -> Found:
    equation, *operands = step.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = [*operands[0]]
    if not isinstance(equation, str) or "->" not in equation or "..." in equation:
        return MIXED
    given, result = equation.replace(" ", "").split("->")
    terms, aligned = given.split(","), []
    for tensor, rows in step.owned:
        for term, operand in zip(terms, operands, strict=True):
            if operand is tensor:
                assert rows.axis is not None
                letter = term[rows.axis]
                if letter not in result:
                    return MIXED
                aligned.append((len(result), rows.moved(result.index(letter))))
    return merged(aligned, len(result))


def _layer_norm(step: Step) -> Found:
    found, shape = _alone(step), step.args[1] if len(step.args) > 1 else step.kwargs["normalized_shape"]
    if found is None or found[1].axis is None:
        return MIXED
    return found[1] if found[1].axis < found[0].dim() - len(shape) else MIXED


def _padded(step: Step) -> Found:
    """Return the owners after padding: unchanged if only later axes are padded or cut."""
    found, sides = _alone(step), step.args[1] if len(step.args) > 1 else step.kwargs["pad"]
    if found is None or found[1].axis is None or found[1].axis >= found[0].dim() - len(sides) // 2:
        return MIXED
    return found[1]


def _of_images(step: Step) -> Found:
    found = _alone(step)
    if step.func.__name__ == "batch_norm" and step.kwargs.get("training", step.args[5:6] != (False,)):
        return MIXED  # statistics of the batch
    if found is None or found[1].axis != 0 or _first(step.out).shape[:1] != found[0].shape[:1]:
        return MIXED
    return found[1]


def _embedding(step: Step) -> Found:
    found = _alone(step)
    return MIXED if found is None or found[0].is_floating_point() else found[1]


def _attention(step: Step) -> Found:
    found = _entry_by_entry(step)
    return found if isinstance(found, Rows) and (found.axis or 0) < _first(step.out).dim() - 2 else MIXED


def _moved(step: Step) -> Found:
    """Return the owners after an operation that only moves entries, by applying it to the owners."""
    name, given = step.func.__name__, step.args[0] if step.args else next(iter(step.kwargs.values()))
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    data = [*tensors_in((given,), {})]
    if not any(id(tensor) in by_id for tensor in data):
        return _picked(step, name)
    if len(data) == 1:
        tensor, rows = data[0], by_id[id(data[0])]
        if name in ("view", "reshape", "flatten", "unflatten") and rows.axis is not None:
            upto = rows.axis + 1
            if step.out.shape[:upto] == tensor.shape[:upto]:
                return rows
    counts = name == "repeat_interleave" and len(step.args) + len(step.kwargs) == 1
    if counts or any(isinstance(option, torch.dtype) for option in step.args):
        return MIXED  # numbers that are read as counts, or bits as other numbers
    labels = {id(t): _labels_of(t, by_id.get(id(t)), step.identity, narrow=_goes_by_rows(step, t, by_id)) for t in data}
    args, kwargs = replaced(step.args, step.kwargs, lambda t: labels.get(id(t), t))
    if name == "_pad_packed_sequence":
        args = (*args[:3], NOBODY, *args[4:])
    made = (
        getattr(torch, name, step.func)(*args, **kwargs)
        if name in ("T", "mT", "H", "mH")
        else step.func(*args, **kwargs)
    )
    if name.startswith("_pa"):  # data and batch sizes; or sequences and their lengths
        sequences = compressed(made[0], step.identity)
        known = name == "_pad_packed_sequence" and isinstance(sequences, Rows)
        return [sequences, sequences.moved(0) if known else MIXED]  # type: ignore[union-attr]
    if isinstance(made, Tensor):
        return compressed(made, step.identity)
    return [compressed(one, step.identity) for one in made]


def _goes_by_rows(step: Step, tensor: Tensor, by_id: dict[int, Rows]) -> bool:
    """Tell whether entries move along the owners' axis only, so that one label per row is enough."""
    name, rows = step.func.__name__, by_id.get(id(tensor))
    if rows is None or rows.axis is None or len(step.args) < 2:
        return False
    if name == "__getitem__":
        return rows.axis == 0 and isinstance(step.args[1], Tensor) and bool(step.args[1].dim() == 1)
    return name == "index_select" and bool(step.args[1] % tensor.dim() == rows.axis)


def _labels_of(tensor: Tensor, rows: Rows | None, identity: Tensor, *, narrow: bool) -> Tensor:
    if rows is None:
        return identity.new_full((1,) * tensor.dim(), NOBODY).expand(tensor.shape)
    shape = tensor.shape
    if narrow:
        shape = torch.Size([size if axis == rows.axis else 1 for axis, size in enumerate(shape)])
    return rows.labels(shape)


def _picked(step: Step, name: str) -> Found:
    """Return the owners of constants that data select: the owners of the index."""
    found = _alone(step)
    if found is None:
        return MIXED
    tensor, rows = found
    if name == "gather" or (name == "__getitem__" and step.args[1] is tensor and tensor.dtype != torch.bool):
        return rows
    if name == "index_select" and tensor.dim() == 1:
        return rows.moved(step.args[1] % step.out.dim())
    return MIXED


def _written(step: Step) -> Found:
    """Return the owners after ``tensor[index] = value``."""
    (target, index, value), by_id = step.args, {id(tensor): rows for tensor, rows in step.owned}
    labels = _labels_of(target, by_id.get(id(target)), step.identity, narrow=False).clone()
    if isinstance(value, Tensor):
        labels[index] = _labels_of(value, by_id.get(id(value)), step.identity, narrow=False)
    else:
        labels[index] = NOBODY
    return compressed(labels, step.identity)


def _added(step: Step) -> Found:
    """Return the owners after rows are added up by an index; mixed if one sum holds rows of several samples."""
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    target, dim, index, source = step.args[:4]
    # counted constants belong to the owner of the index
    rows, before = by_id.get(id(source), by_id.get(id(index))), by_id.get(id(target))
    if rows is None and before is None:
        return None
    if rows is None or (rows.axis is not None and rows.axis != dim % target.dim()):
        return MIXED
    if index.dim() > 1:  # the same index for all entries of a row, as message passing has it
        others = [axis for axis in range(index.dim()) if axis != dim % target.dim()]
        if any(index.shape[axis] > 1 and index.stride(axis) != 0 for axis in others):
            return MIXED
        for axis in sorted(others, reverse=True):
            index = index.select(axis, 0)
    owners = rows.labels(torch.Size([len(index)])) if rows.axis is None else rows.index[: len(index)]
    size = target.shape[dim]
    made = owners.new_full((size,), NOBODY).scatter_(0, index, owners)
    if not torch.equal(made[index], owners):
        return MIXED
    if before is not None:
        if before.axis is None or before.axis != dim % target.dim():
            return MIXED
        both = torch.maximum(made, before.index)
        if not all(bool(((one == both) | (one == NOBODY)).all()) for one in (made, before.index)):
            return MIXED
        made = both
    fitting = [index for index in (step.identity, *step.known) if _fits(made, index)]
    if fitting and all(torch.equal(fitting[0], other) for other in fitting[1:]):
        made = fitting[0]  # also the rows that nothing was added to
    return Rows(dim % target.dim(), made, is_identity=made is step.identity)


def _fits(made: Tensor, index: Tensor) -> bool:
    return made.shape == index.shape and bool(((made == index) | (made == NOBODY)).all())


_HANDLERS: dict[str, Callable[[Step], Found]] = {
    **dict.fromkeys((*ALIGNED, *SAME_ENTRIES, *_UNARY.split()), _entry_by_entry),
    **dict.fromkeys(_REDUCING, _reduced),
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(("matmul", "mm", "mv", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    **dict.fromkeys(_IMAGES.split(), _of_images),
    **dict.fromkeys(_ADDING, _added),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    "linear": _linear,
    "einsum": _einsum,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "__setitem__": _written,
}


def moved_entries(name: str, args: Any) -> list[Tensor]:
    """Return the arguments whose entries an indexed operation puts into its result; none for other operations."""
    if name.rstrip("_") in _ADDING:
        return [tensor for tensor in (args[0], args[3] if len(args) > 3 else None) if isinstance(tensor, Tensor)]
    if name in _PICKS.split() and args:
        return [*tensors_in((args[0],), {})]
    return []


def handler_of(name: str) -> Callable[[Step], Found] | None:
    """Return the function that computes owners for an operation of that name; None if unknown."""
    return _HANDLERS.get(name) or _HANDLERS.get(name.rstrip("_"))


def owners_after(step: Step, name: str) -> Found:
    """Return the owners of a result, or of each tensor in it."""
    one = {rows.only for _, rows in step.owned}
    if len(one) == 1 and None not in one:
        return Rows(None, step.owned[0][1].index[:1])
    handler = handler_of(name)
    if handler is None:
        return MIXED
    if handler not in (_moved, _entry_by_entry, _written, _added) and any(rows.axis is None for _, rows in step.owned):
        return MIXED
    return handler(step)


__all__ = ["CONSTANTS", "Mixed", "Step", "handler_of", "owners_after"]
