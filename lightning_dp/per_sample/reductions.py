"""Owners of the result of an operation that computes over some axes: they stay where theirs is not among these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_dp.per_sample.owned import MIXED, NOBODY, Memo, Owners, Rows, merged

_REDUCES = """
    sum nansum mean nanmean amax amin prod logsumexp softmax log_softmax cumsum cumprod cummax cummin logcumsumexp any
    all argmax argmin sort argsort median nanmedian var std count_nonzero max min var_mean std_mean aminmax
"""
_REDUCES_SECOND = """
    norm vector_norm linalg_norm linalg_vector_norm topk kthvalue fft_fft fft_ifft fft_rfft fft_irfft fft_hfft
    fft_ihfft
"""
_IMAGES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d group_norm instance_norm batch_norm upsample_nearest1d upsample_nearest2d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d im2col pixel_shuffle pixel_unshuffle
    glu
"""

_REDUCING = {**dict.fromkeys(_REDUCES.split(), 1), **dict.fromkeys(_REDUCES_SECOND.split(), 2)}
"""Names of operations that compute over some axes, with the position of the argument that names these."""

_LAST_AXIS = frozenset(
    ["sort", "argsort", "topk", "kthvalue", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft"]
)


class Step(NamedTuple):
    """One operation that has run.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: the same, by name.
        out: its result.
        owned: tensors that hold data, with their owners.
        identity: ``0 ... B - 1``.
        known: owners that the batch holds or that are the samples in order.
        memo: of the microbatch.
    """

    func: Any
    args: Any
    kwargs: Any
    out: Any
    owned: list[tuple[Tensor, Rows]]
    identity: Tensor
    known: Sequence[Rows]
    memo: Memo


Found = Owners | list[Owners]


def first_of(out: Any) -> Tensor:
    """Return the first tensor of a result."""
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def alone(step: Step) -> tuple[Tensor, Rows] | None:
    """Return the only tensor with data, and its owners; None if there are several."""
    return step.owned[0] if len(step.owned) == 1 else None


def entry_by_entry(step: Step) -> Found:
    """Return the owners of a result whose entries are computed one by one, with broadcasting."""
    return merged([(tensor.dim(), rows) for tensor, rows in step.owned], first_of(step.out).dim(), step.memo)


def _reduced(step: Step) -> Found:
    """Return the owners after a reduction: unchanged if the reduced axes do not include theirs."""
    name = step.func.__name__.rstrip("_")
    if len(step.owned) > 1 or (len(step.args) > 1 and isinstance(step.args[1], Tensor)):
        return entry_by_entry(step)
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
    keeps = first_of(step.out).dim() == tensor.dim()
    return rows.moved(rows.axis if keeps else rows.axis - sum(axis < rows.axis for axis in axes))


def _linear(step: Step) -> Found:
    found = alone(step)
    if found is None or found[0] is not step.args[0]:
        return MIXED
    tensor, rows = found
    return rows if rows.axis is not None and rows.axis < tensor.dim() - 1 else MIXED


def _matmul(step: Step) -> Found:
    left, right = (step.args[1], step.args[0]) if step.func.__name__ == "__rmatmul__" else step.args[:2]
    num_axes, aligned = first_of(step.out).dim(), []
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
    return merged([(num_axes, rows) for rows in aligned], num_axes, step.memo)


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
    return merged(aligned, len(result), step.memo)


def _layer_norm(step: Step) -> Found:
    found, shape = alone(step), step.args[1] if len(step.args) > 1 else step.kwargs["normalized_shape"]
    if found is None or found[1].axis is None:
        return MIXED
    return found[1] if found[1].axis < found[0].dim() - len(shape) else MIXED


def _padded(step: Step) -> Found:
    """Return the owners after padding: unchanged if only later axes are padded or cut."""
    found, sides = alone(step), step.args[1] if len(step.args) > 1 else step.kwargs["pad"]
    if found is None or found[1].axis is None or found[1].axis >= found[0].dim() - len(sides) // 2:
        return MIXED
    return found[1]


def _of_images(step: Step) -> Found:
    found = alone(step)
    if step.func.__name__ == "batch_norm" and step.kwargs.get("training", step.args[5:6] != (False,)):
        return MIXED  # statistics of the batch
    if found is None or found[1].axis != 0 or first_of(step.out).shape[:1] != found[0].shape[:1]:
        return MIXED
    return found[1]


def _last_axis(step: Step) -> Found:
    """Numbers that are read as pairs along the last axis, or distances between rows: other axes stay."""
    found, out = alone(step), first_of(step.out)
    if found is None or found[1].axis is None or found[0] is not step.args[0]:
        return MIXED
    if step.func.__name__ == "cdist" and found[0].dim() != out.dim():
        return MIXED
    return found[1] if found[1].axis < min(found[0].dim() - 1, out.dim()) else MIXED


def _compared(step: Step) -> Found:
    """Rows compared along one axis, which the result does not have."""
    axes = max(tensor.dim() for tensor in step.args[:2])
    over = step.kwargs.get("dim", step.args[2] if len(step.args) > 2 else 1) % axes
    found = merged([(tensor.dim(), rows) for tensor, rows in step.owned], axes, step.memo)
    if not isinstance(found, Rows) or found.axis is None or found.axis == over:
        return MIXED
    return found.moved(found.axis - (over < found.axis))


def _unpooled(step: Step) -> Found:
    """Images, and the places that their entries go to, of the same samples."""
    found = entry_by_entry(step)
    return found if isinstance(found, Rows) and found.axis == 0 else MIXED


def _embedding(step: Step) -> Found:
    found = alone(step)
    return MIXED if found is None or found[0].is_floating_point() else found[1]


def _stacked(step: Step) -> Found:
    """Stacks of matrices: the first axis of each goes through them."""
    found = entry_by_entry(step)
    alike = all(tensor.dim() == 3 for tensor, _ in step.owned)
    return found if alike and isinstance(found, Rows) and found.axis == 0 else MIXED


def _attention(step: Step) -> Found:
    found = entry_by_entry(step)
    return found if isinstance(found, Rows) and (found.axis or 0) < first_of(step.out).dim() - 2 else MIXED


HANDLERS: dict[str, Callable[[Step], Found]] = {
    **dict.fromkeys(_REDUCING, _reduced),
    **dict.fromkeys(("matmul", "mm", "mv", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    **dict.fromkeys(_IMAGES.split(), _of_images),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("view_as_complex", "view_as_real", "cdist"), _last_axis),
    **dict.fromkeys(("max_unpool1d", "max_unpool2d", "max_unpool3d"), _unpooled),
    "cosine_similarity": _compared,
    "linear": _linear,
    "einsum": _einsum,
    **dict.fromkeys(("embedding", "one_hot"), _embedding),
    "baddbmm": _stacked,
    "scaled_dot_product_attention": _attention,
}
