"""The axis of the owners in the result of an operation on one tensor with data, found without a look at any values.

Each function takes the tensor, the axis of its owners, and the operation's arguments and result. It returns None where
the owners do not simply stay with their entries: moves.py and reductions.py then compute them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

AxisAfter = Callable[[Tensor, int, Any, Any, Any], int | None]

_REDUCES = """
    sum nansum mean nanmean amax amin prod logsumexp softmax log_softmax cumsum cumprod cummax cummin logcumsumexp any
    all argmax argmin sort argsort median nanmedian var std count_nonzero max min var_mean std_mean aminmax
    _sparse_sum
"""
_REDUCES_SECOND = """
    norm vector_norm linalg_norm linalg_vector_norm topk kthvalue fft_fft fft_ifft fft_rfft fft_irfft fft_hfft
    fft_ihfft
"""
_OF_PICTURES = "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2"
_DEFAULTS: dict[str, int | tuple[int, ...]] = {
    **dict.fromkeys(_REDUCES_SECOND.split()[4:], -1),
    **dict.fromkeys(("sort", "argsort"), -1),
    **dict.fromkeys(_OF_PICTURES.split(), (-2, -1)),
}
"""The axes over which operations compute that are given none, if these are not all."""
_IMAGES = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d group_norm instance_norm upsample_nearest1d upsample_nearest2d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d im2col pixel_shuffle pixel_unshuffle glu
    channel_shuffle native_channel_shuffle affine_grid_generator
"""
_OVER_SECOND = [*_REDUCES_SECOND.split(), *_OF_PICTURES.split(), "fft_fftn", "fft_ifftn"]
REDUCING = {**dict.fromkeys(_REDUCES.split(), 1), **dict.fromkeys(_OVER_SECOND, 2)}
"""Names of operations that compute over some axes, with the position of the argument that names these."""

JOINS = frozenset(("cat", "concat", "concatenate"))
RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as"))


def first_of(out: Any) -> Tensor:
    """Return the first tensor of a result."""
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def _reduced(
    tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any, *, at: int, default: int | tuple[int, ...] | None
) -> int | None:
    if len(args) > 1 and isinstance(args[1], Tensor):
        return None
    over = kwargs.get("dim", kwargs.get("axis", args[at] if len(args) > at else default))
    named = () if over is None or isinstance(over, bool) else (over,) if isinstance(over, int) else tuple(over)
    axes = {one % max(1, tensor.dim()) for one in named or range(tensor.dim())}
    if axis in axes:
        return None
    return axis if first_of(out).dim() == tensor.dim() else axis - sum(one < axis for one in axes)


def _linear(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    return axis if tensor is args[0] and axis < tensor.dim() - 1 else None


def _layer_norm(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return axis if axis < tensor.dim() - len(shape) else None


def _padded(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis if it is neither padded nor cut."""
    sides = args[1] if len(args) > 1 else kwargs["pad"]
    first = 2 * (tensor.dim() - 1 - axis)  # the last axis comes first
    return None if any(sides[first : first + 2]) else axis


def _of_images(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    is_image = tensor is (args[0] if args else kwargs.get("input"))
    return axis if is_image and axis == 0 and first_of(out).shape[:1] == tensor.shape[:1] else None


def _batch_norm(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    has_statistics_of_the_batch = kwargs.get("training", args[5:6] != (False,))
    return None if has_statistics_of_the_batch else _of_images(tensor, axis, args, kwargs, out)


def _last_axis(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis if it is not the last one, which is read as pairs, or compared between rows."""
    return axis if tensor is args[0] and axis < min(tensor.dim() - 1, out.dim()) else None


def _distances(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis of the rows that distances are computed for: those of the second tensor are the last axis."""
    if tensor.dim() != out.dim() or axis == tensor.dim() - 1:
        return None
    return axis + 1 if axis == tensor.dim() - 2 and tensor is not args[0] else axis


def _embedding(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    return None if tensor.is_floating_point() else axis


def _reshaped(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis if the axes up to it are the same in another shape of the same entries."""
    before, after = tensor.shape, out.shape
    keeps = len(after) > axis and after[axis] == before[axis] and (axis == 0 or after[:axis] == before[:axis])
    keeps = keeps and tensor is args[0] and out.dtype == tensor.dtype  # not bits read as other numbers
    return axis if keeps else None


def _expanded(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis if it keeps its length: its entries are not repeated."""
    at = axis + int(out.dim()) - tensor.dim()
    return at if tensor is args[0] and out.shape[at] == tensor.shape[axis] else None


def _swapped(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    if len(args) != 3:
        return None
    one, other = args[1] % tensor.dim(), args[2] % tensor.dim()
    return int(other if axis == one else one if axis == other else axis)


def _unsqueezed(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    return axis + int(args[1] % (tensor.dim() + 1) <= axis) if len(args) == 2 else None


def _permuted(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    if len(args) < 2:
        return None
    return [one % tensor.dim() for one in (args[1] if len(args) == 2 else args[1:])].index(axis)


def indexed(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the axis after an index of numbers, slices, new axes and at most one vector, if it takes every entry of
    the axis.
    """
    at = after = 0
    found: int | None = None
    parts = args[1] if type(args[1]) is tuple else (args[1],)
    kinds = [*map(type, parts)]
    if tensor is not args[0] or (Tensor in kinds and (int in kinds or kinds.count(Tensor) > 1)):
        return None
    for part, kind in zip(parts, kinds, strict=True):
        if part is None:
            after += 1
            continue
        covers = 1
        if part is Ellipsis:
            covers = tensor.dim() - sum(one is not None and one is not Ellipsis for one in parts)
        elif kind is not slice and kind is not int and (kind is not Tensor or part.dim() != 1):
            return None
        if at <= axis < at + covers:
            if kind is int or kind is Tensor or (kind is slice and part != slice(None)):
                return None
            found = after + axis - at
        at += covers
        after += 0 if kind is int else covers
    return after + axis - at if found is None else found


def _turned(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any, *, at: int) -> int | None:
    """Return the axis if entries change places along other axes only."""
    over = kwargs.get("dims", args[at:] if at == 1 and len(args) > 2 else args[at] if len(args) > at else None)
    if over is None:
        return None
    return None if axis in {one % tensor.dim() for one in ((over,) if isinstance(over, int) else over)} else axis


def _joined(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    over = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return None if over % out.dim() == axis else axis


def _stacked(tensor: Tensor, axis: int, args: Any, kwargs: Any, out: Any) -> int | None:
    over = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    return axis + int(over % out.dim() <= axis)


AXES: dict[str, AxisAfter] = {
    **{name: partial(_reduced, at=at, default=_DEFAULTS.get(name)) for name, at in REDUCING.items()},
    **dict.fromkeys(_IMAGES.split(), _of_images),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("view_as_complex", "view_as_real", "multinomial", "_sample_dirichlet"), _last_axis),
    **dict.fromkeys(("embedding", "one_hot"), _embedding),
    "batch_norm": _batch_norm,
    "cdist": _distances,
    "linear": _linear,
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _expanded),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _swapped),
    "unsqueeze": _unsqueezed,
    "permute": _permuted,
    "__getitem__": indexed,
    "flip": partial(_turned, at=1),
    "roll": partial(_turned, at=2),
    **dict.fromkeys(JOINS, _joined),
    "stack": _stacked,
}
"""Functions by the name of the operation."""
