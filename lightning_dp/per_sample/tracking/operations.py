"""The table of torch functions and their handlers: a rule, simpler operations, the general handler, or none."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.rules.base import Rule
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.embedding import EmbeddingRule
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.norm import GroupNormRule, InstanceNormRule, LayerNormRule, RMSNormRule
from lightning_dp.per_sample.tracking import assigning, bags, cells, composites, recurrent, sparse_made
from lightning_dp.per_sample.tracking.arguments import by_position
from lightning_dp.per_sample.tracking.nodes import is_tracked

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


class Operation(NamedTuple):
    """An entry of the table of operations.

    Args:
        run: function that runs the operation.
        is_composite: whether ``run`` calls simpler operations, which report themselves.
        keeps_rows: whether the rows of the result have the owners of the first argument with data.
    """

    run: Callable[[Tracker, Any, Any, Any], Any]
    is_composite: bool = False
    keeps_rows: bool = False


_ARITHMETIC = """add sub mul div pow rsub truediv rdiv rtruediv radd rmul rpow idiv itruediv iadd isub imul ipow eq ne
    lt le gt ge and or xor"""
_ELEMENTWISE = """subtract multiply divide true_divide floor_divide float_power where lerp lerp_ addcmul addcmul_
    addcdiv addcdiv_ maximum minimum fmax fmin clamp clamp_ clip clip_ clamp_min clamp_max fmod remainder atan2 arctan2
    hypot logaddexp logaddexp2 xlogy copysign greater less greater_equal less_equal not_equal isclose copy_ masked_fill
    masked_fill_ scaled_dot_product_attention"""
_COPIES = "to float double half bfloat16 type type_as clone contiguous"
_WITHOUT_GRADIENT = """detach detach_ size dim ndimension numel nelement stride storage_offset data_ptr untyped_storage
    storage element_size is_contiguous is_floating_point is_complex is_signed is_pinned is_shared is_same_size is_set_to
    get_device item tolist numpy equal allclose __len__ __repr__ __format__ __str__ __hash__ __bool__ __int__ __float__
    __complex__ __index__ __contains__ __array__ __dir__ __deepcopy__ __reduce_ex__ __reduce__ __setstate__ __set__
    __delete__ __dlpack__ __dlpack_device__ register_post_accumulate_grad_hook requires_grad_ backward zero_ result_type
    can_cast zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty
    new_full new_tensor share_memory_ pin_memory is_nonzero has_names _is_view is_inference record_stream"""

ALIGNED = frozenset(
    [f"__{name}__" for name in _ARITHMETIC.split()]
    + [f"{name}{end}" for name in _ARITHMETIC.split() for end in ("", "_")]
    + _ELEMENTWISE.split()
)
"""Names of operations whose result is computed entry by entry, with broadcasting."""

SAME_ENTRIES = frozenset(_COPIES.split())
"""Names of operations whose result has the entries of their argument, perhaps in another type."""

IN_PLACE = re.compile(r"[a-z].*_|__i[a-z]+__|__setitem__")
"""Names of operations that change their first argument."""

_UNARY = "softplus exp log log1p expm1 sigmoid tanh relu neg __neg__ abs square sqrt rsqrt reciprocal"

ENTRYWISE = frozenset(
    [*_UNARY.split(), *(name for name in ALIGNED if not IN_PLACE.fullmatch(name) and "attention" not in name)]
)
"""Names of operations whose result is computed entry by entry, without randomness, and is no argument of them."""

_NOT_FOLLOWED = frozenset(_WITHOUT_GRADIENT.split())
"""Names of operations through which no gradient flows."""


class Bound(NamedTuple):
    """The arguments of an operation, arranged for its rule.

    Args:
        tensors: input, weight, bias.
        spec: settings that the rule reads.
        call: runs the operation, given the torch function and weight and bias as ordinary tensors.
    """

    tensors: tuple[Any, Any, Any]
    spec: Any
    call: Callable[[Any, Any, Any], Tensor]


def _linear(input: Any, weight: Any, bias: Any = None) -> Bound:
    return Bound((input, weight, bias), None, lambda func, w, b: func(input, w, b))


@functools.lru_cache
def _conv_spec(shape: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> nn.Module:
    axes = len(shape) - 2
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]

    def full(one: Any) -> Any:
        return one if isinstance(one, str) or (isinstance(one, tuple) and len(one) == axes) else _number(one)

    return kind(
        shape[1] * groups, shape[0], shape[2:], full(stride), full(padding), full(dilation), groups, device="meta"
    )


def _number(one: Any) -> Any:
    return one[0] if isinstance(one, tuple) else one


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Bound:
    options = [tuple(one) if isinstance(one, list) else one for one in (stride, padding, dilation)]
    spec = _conv_spec(weight.shape, *options, groups)
    return Bound((input, weight, bias), spec, lambda func, w, b: func(input, w, b, *options, groups))


@functools.lru_cache
def _spec(kind: type[nn.Module], *options: Any) -> nn.Module:
    return kind(*options, device="meta")


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Bound:
    if (max_norm is not None or scale_grad_by_freq) and weight.requires_grad:
        raise PrivacyError(
            f"Expected an embedding without max_norm and scale_grad_by_freq, got max_norm={max_norm} and "
            f"scale_grad_by_freq={scale_grad_by_freq}. They change weights or gradients by the tokens of the whole "
            "batch; leave them out."
        )
    spec = _spec(nn.Embedding, *weight.shape, padding_idx)
    return Bound((input, weight, None), spec, lambda func, w, b: func(input, w, padding_idx, max_norm))


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Bound:
    shape = tuple(normalized_shape)
    spec = _spec(nn.LayerNorm, shape, eps)
    return Bound((input, weight, bias), spec, lambda func, w, b: func(input, shape, w, b, eps))


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Bound:
    shape = tuple(normalized_shape)
    return Bound((input, weight, None), _spec(nn.RMSNorm, shape, eps), lambda func, w, b: func(input, shape, w, eps))


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Bound:
    spec = _spec(nn.GroupNorm, num_groups, input.shape[1], eps)
    return Bound((input, weight, bias), spec, lambda func, w, b: func(input, num_groups, w, b, eps))


def _instance_norm(
    input: Any,
    running_mean: None = None,
    running_var: None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Bound:
    spec = _spec(nn.InstanceNorm1d, input.shape[1], eps)
    return Bound((input, weight, bias), spec, lambda func, w, b: func(input, None, None, w, b, True, momentum, eps))


def _ruled(rule: Rule, bind: Callable[..., Bound]) -> Operation:
    return Operation(lambda tracker, func, args, kwargs: tracker.use(func, args, kwargs, rule, bind(*args, **kwargs)))


_INSTANCE_NORM, _LINEAR_RULE = _ruled(InstanceNormRule(), _instance_norm), LinearRule()


def _any_linear(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    bound = _linear(*args, **kwargs)
    _, weight, bias = bound.tensors
    if bias is not None and bias.shape != weight.shape[:1]:  # an entry of the bias counts for several features
        return tracker.general(func, args, kwargs)
    return tracker.use(func, args, kwargs, _LINEAR_RULE, bound)


def _any_instance_norm(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    if (len(args) > 1 and args[1] is not None) or kwargs.get("running_mean") is not None:
        return composites.instance_norm_of_running(tracker, func, *args, **kwargs)
    return tracker.primitive(func, args, kwargs, _INSTANCE_NORM)


def _any_matmul(tracker: Tracker, func: Any, a: Any, b: Any, *reduction: Any, **kwargs: Any) -> Any:
    is_sparse = any(one.layout is not torch.strided for one in (a, b) if not is_tracked(one))
    if reduction or (is_sparse and kwargs):
        return tracker.primitive(func, (a, b, *reduction), kwargs)
    if not is_sparse or is_tracked(a) == is_tracked(b):
        return composites.matmul(tracker, func, a, b, **kwargs)
    return bags.sparse_product(tracker, func, *((b, a) if func.__name__ == "__rmatmul__" else (a, b)))


def _general(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    return tracker.general(func, args, kwargs)


GENERAL = Operation(_general)
"""The handler of operations that have no other."""


def _composite(function: Callable[..., Any]) -> Operation:
    return Operation(functools.partial(by_position, function), is_composite=True)


def _entered(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    return composites.entered(func)(*args, **kwargs)


_LAYER_NORM = _ruled(LayerNormRule(), _layer_norm)
_RMS_NORM = _ruled(RMSNormRule(), _rms_norm)
_GROUP_NORM = _ruled(GroupNormRule(), _group_norm)
_CONV = _ruled(ConvRule(), _conv)
_MATMUL, _RECURRENT = _composite(_any_matmul), _composite(recurrent.recurrent)
_CELL, _LIKE = _composite(cells.rnn_cell), _composite(composites.like)
_GROUPED = [getattr(home, name) for home, name in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(home, name)]

_KNOWN: dict[Any, Operation | None] = {
    F.linear: Operation(_any_linear),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    F.embedding: _ruled(EmbeddingRule(), _embedding),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _LAYER_NORM),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _RMS_NORM),
    **dict.fromkeys((F.group_norm, torch.group_norm), _GROUP_NORM),
    F.instance_norm: Operation(_any_instance_norm, is_composite=True),
    F.batch_norm: _composite(composites.batch_norm),
    **dict.fromkeys((torch.matmul, torch.mm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.mv), _MATMUL),
    **dict.fromkeys((Tensor.__matmul__, Tensor.__rmatmul__, torch.sparse.mm, torch.spmm), _MATMUL),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _composite(composites.addmm)),
    torch.tensordot: _composite(composites.tensordot),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _composite(composites.index_select)),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _RECURRENT),
    **dict.fromkeys((torch.rnn_tanh_cell, torch.rnn_relu_cell), _CELL),
    **dict.fromkeys((Tensor.register_hook, Tensor.retain_grad), _composite(composites.watch)),
    Tensor.__getitem__: _composite(composites.getitem),
    Tensor.__setitem__: _composite(assigning.setitem),
    Tensor.index_put_: _composite(assigning.index_put_),
    **dict.fromkeys((Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill), _composite(assigning.masked_fill)),
    **dict.fromkeys((Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as), _LIKE),
    **dict.fromkeys((Tensor.expand, Tensor.repeat), _composite(composites.sized)),
    torch.broadcast_tensors: _composite(composites.broadcast_tensors),
    torch.autograd.grad: _composite(composites.grad),
    F.bilinear: _composite(composites.bilinear),
    torch.prelu: _composite(composites.prelu),
    **dict.fromkeys(_GROUPED, _composite(composites.grouped_mm)),
    torch.embedding: _composite(bags.embedding_of_weight),
    F.embedding_bag: _composite(bags.embedding_bag),
    **{func: _composite(handler) for func, handler in sparse_made.HANDLERS.items()},
    torch.lstm_cell: _composite(cells.lstm_cell),
    torch.gru_cell: _composite(cells.gru_cell),
}


def add(func: Any, operation: Operation | None) -> None:
    """Set the handler of an operation; None removes it, so that the default handler applies."""
    if operation is None:
        _KNOWN.pop(func, None)
    else:
        _KNOWN[func] = operation


def operation_of(func: Any) -> Operation | None:
    """Return the handler of an operation; None if no gradient flows through the operation."""
    try:
        return _KNOWN[func]
    except KeyError:
        pass
    name = getattr(func, "__name__", "")
    operation: Operation | None = GENERAL
    if name in ("__get__", "__set__", "__delete__"):
        what = getattr(getattr(func, "__self__", None), "__name__", "")
        operation = (
            _composite(composites.transposed)
            if name == "__get__" and what in ("T", "mT", "H", "mH", "real", "imag")
            else None
        )
    elif name in _NOT_FOLLOWED:
        operation = None
    elif isinstance(func, FunctionType) and func.__module__ == "torch.nn.functional":
        operation = Operation(_entered, is_composite=True)
    _KNOWN[func] = operation
    return operation
