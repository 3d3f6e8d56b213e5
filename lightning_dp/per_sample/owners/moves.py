"""Owners of the result of an operation, computed from the owners of its arguments.

The result of an operation that is not listed has unknown owners, unless all its arguments belong to one sample. A
missing entry never voids a guarantee: it costs speed, because another way to per-sample gradients is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners import adding, reductions, sparse
from lightning_dp.per_sample.owners.adding import added, after_adding, filled
from lightning_dp.per_sample.owners.axes import JOINS, AxisAfter, indexed
from lightning_dp.per_sample.owners.entries import by_entry
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.owned import MIXED, NOBODY, Mixed, Owners, Rows, compressed
from lightning_dp.per_sample.owners.reductions import Found, Step, alone, entry_by_entry
from lightning_dp.per_sample.owners.views import joined_rows, moved_rows, owners_of_view, picked, rows_at
from lightning_dp.per_sample.tracking.arguments import replaced, tensors_in
from lightning_dp.per_sample.tracking.operations import ALIGNED, SAME_ENTRIES

_UNARY = """
    relu relu6 gelu sigmoid tanh exp exp2 expm1 log log1p log2 log10 sqrt rsqrt abs absolute neg negative sin cos tan
    erf erfc silu mish softplus elu selu celu leaky_relu hardtanh hardswish hardsigmoid logsigmoid log_sigmoid square
    reciprocal logical_not logical_and logical_or logical_xor bitwise_not isnan isinf isfinite nan_to_num round floor
    ceil trunc frac sign sgn dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout bernoulli logit
    long int bool detach threshold hardshrink softshrink tanhshrink rrelu lgamma digamma invert __invert__ __neg__
    __abs__ __pos__ tril triu cpu cuda requires_grad_ data real imag prelu asin acos atan asinh acosh atanh sinh cosh
    sinc angle conj conj_physical resolve_conj positive erfinv bitwise_and bitwise_or bitwise_xor heaviside complex
    arcsin arccos arctan arcsinh arccosh arctanh deg2rad rad2deg fix byte short special_ndtr special_log_ndtr polar
    special_xlogy normal poisson binomial _standard_gamma as_tensor asarray
"""
_MOVES = """
    __getitem__ index_select gather take take_along_dim cat concat concatenate stack hstack vstack dstack split hsplit
    split_with_sizes tensor_split chunk unsafe_chunk unsafe_split unbind narrow select transpose swapaxes swapdims
    movedim moveaxis permute t T mT H mH adjoint view reshape flatten unflatten ravel squeeze unsqueeze expand repeat
    repeat_interleave tile broadcast_to flip fliplr flipud roll rot90 diagonal unfold masked_select expand_as view_as
    reshape_as select_scatter pad_sequence _pack_padded_sequence _pad_packed_sequence
"""
_PICKED = """
    __getitem__ index_select gather take take_along_dim repeat_interleave masked_select _pack_padded_sequence
    _pad_packed_sequence
"""
_PICKS = frozenset(_PICKED.split())
_PACKS = frozenset(("_pack_padded_sequence", "_pad_packed_sequence"))
_MAKES_CONSTANTS = """
    zeros_like ones_like rand_like randn_like randint_like empty_like new_zeros new_ones new_empty zero_ arange zeros
    ones empty eye linspace logspace rand randn randint randperm tril_indices triu_indices uniform_ normal_
    exponential_ cauchy_ geometric_ log_normal_ random_ hann_window hamming_window full new_full full_like
"""

_ADDING = frozenset(("scatter_add", "index_add", "scatter_reduce", "index_reduce", "scatter", "index_copy"))
CONSTANTS = frozenset(_MAKES_CONSTANTS.split())
"""Names of operations whose result holds no data."""

MADE_OF_NUMBERS = frozenset(("tensor", "as_tensor", "asarray", "scalar_tensor", "normal"))
"""Names of operations whose result holds no data if they are given numbers, not tensors."""


def _moved(step: Step) -> Found:
    """Return the owners after an operation that only moves entries, by running the operation on the owners."""
    name, given = step.func.__name__, step.args[0] if step.args else next(iter(step.kwargs.values()))
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    data = tensors_in((given,), {})
    if not any(id(tensor) in by_id for tensor in data):
        return picked(step, name)
    counts = name == "repeat_interleave" and len(step.args) + len(step.kwargs) == 1
    if counts or any(isinstance(option, torch.dtype) for option in (*step.args, *step.kwargs.values())):
        return MIXED  # numbers that are read as counts, or bits as other numbers
    if name in _PACKS:
        return _packed(step, name, data[0], by_id[id(data[0])])
    if len(data) == 1:
        found = moved_rows(step, name, data[0], by_id[id(data[0])])
        if found is not None:
            return found
    elif name in JOINS:
        found = joined_rows(step, data, by_id)
        if found is not None:
            return found
    labels = {id(t): _labels_of(t, by_id.get(id(t)), step.identity, narrow=_goes_by_rows(step, t, by_id)) for t in data}
    args, kwargs = replaced(step.args, step.kwargs, lambda t: labels.get(id(t), t))
    if name == "pad_sequence":  # what is filled up belongs to nobody
        args = (*args[:2], NOBODY, *args[3:])
    made = (
        getattr(torch, name, step.func)(*args, **kwargs)
        if name in ("T", "mT", "H", "mH")
        else step.func(*args, **kwargs)
    )
    shared = step.memo.shared
    return by_entry(made, shared, name) if isinstance(made, Tensor) else [by_entry(one, shared, name) for one in made]


def _packed(step: Step, name: str, tensor: Tensor, rows: Rows) -> Found:
    """Return the owners of packed sequences and of their batch sizes, or of padded sequences and of their lengths."""
    pads = name == "_pad_packed_sequence"
    _, lengths, *options = step.args  # torch calls both with these by position
    if pads:
        options[1] = NOBODY  # owns what is filled up
    shape = tensor.shape[: max(1 if pads else 2, 1 + (rows.axis or 0))]

    def made() -> list[Owners]:
        sequences = compressed(step.func(rows.labels(shape), lengths, *options)[0], step.memo.shared)
        return [sequences, sequences.moved(0) if pads and isinstance(sequences, Rows) else MIXED]

    found: list[Owners] = step.memo.get((name, rows.axis, shape, *options), (rows,), lengths, made)
    return found


def _goes_by_rows(step: Step, tensor: Tensor, by_id: dict[int, Rows]) -> bool:
    """Tell whether an indexing operation selects whole rows along the axis on which the owners vary."""
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


def _written(step: Step) -> Found:
    """Return the owners of a tensor after ``tensor[index] = value``.

    Constants that a sample puts somewhere are its own. If an index sends rows of different samples to one position, any
    of them may remain there, so this position belongs to several samples. It does no harm if it is cut off, like a last
    position of a dense batch that takes all rows beyond its width.
    """
    (target, index, value), by_id = step.args, {id(tensor): rows for tensor, rows in step.owned}
    before, after = by_id.get(id(target)), by_id.get(id(value))
    parts = index if isinstance(index, tuple) else (index,)
    if (
        before is not None
        and not any(id(part) in by_id for part in parts)
        and _stays(target, index, value, before, after)
    ):
        return before
    lists = all(isinstance(one, Tensor) and one.dim() == 1 and one.dtype == torch.int64 for one in parts)
    put: Any = NOBODY
    if before is None and after is None:
        puts = [by_id[id(one)].labels(one.shape) for one in parts if id(one) in by_id] if lists else []
        if not puts:  # constants, put where data says
            return None
        if not all(torch.equal(puts[0], other) for other in puts[1:]):
            return MIXED
        shape, put = target.shape[: len(parts)], puts[0]
    else:
        narrow = lists and _writes_rows(target, parts, value, before, after)
        shape = target.shape[: len(parts)] if narrow else target.shape
        if isinstance(value, Tensor) and after is not None:
            put = after.labels(value.shape[:1] if narrow else value.shape)
    labels = step.identity.new_full(shape, NOBODY) if before is None else before.labels(shape).clone()
    labels[index] = put
    if isinstance(put, Tensor) and bool((lost := labels[index] != put).any()):
        at = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[index]
        labels.view(-1)[at[lost]] = step.memo.several = len(step.identity)
    return compressed(labels, step.memo.shared)


def _stays(target: Tensor, index: Any, value: Any, before: Rows, after: Rows | None) -> bool:
    """Tell whether ``target[index] = value`` writes to every row what belongs to its owner, or constants."""
    at = None if before.axis is None else indexed(target, before.axis, (target, index), {}, None)
    if at is None or after is None:
        return at is not None
    from_end = target[index].dim() - at
    return after.axis is not None and after.index is before.index and value.dim() - after.axis == from_end


def _writes_rows(
    target: Tensor, index: tuple[Tensor, ...], value: Any, before: Rows | None, after: Rows | None
) -> bool:
    """Tell whether ``target[index] = value`` writes whole rows of one axis, one for each entry of the index."""
    alike = not isinstance(value, Tensor) or value.shape == (len(index[0]), *target.shape[len(index) :])
    return alike and (before is None or (before.axis or 0) < len(index)) and (after is None or not after.axis)


def _strided(step: Step) -> Found:
    """Return the owners of a view that is given by strides."""
    found = alone(step)
    return (None if found is None else owners_of_view(*found, step.out, step.memo)) or MIXED


def keeps_to_positions(name: str, args: Any, given: list[tuple[Tensor, Owners]], memo: Memo) -> bool:
    """Tell whether tensors of unknown owners only say to which positions of a tensor rows go, and are running sums or
    send all rows to rows of their own samples.
    """
    unknown = [(tensor, rows) for tensor, rows in given if isinstance(rows, Mixed)]
    if name != "__setitem__" or any(tensor is args[0] or tensor is args[2] for tensor, _ in unknown):
        return False
    return all(rows.is_running for _, rows in unknown) or _returns(args, given, memo)


def _returns(args: Any, given: list[tuple[Tensor, Owners]], memo: Memo) -> bool:
    """Tell whether ``target[index] = value`` sends rows to rows of their own samples, as an unpooling of nodes does."""
    target, index, value = args
    rows = next((rows for tensor, rows in given if tensor is value), None)
    is_index = isinstance(index, Tensor) and index.dim() == 1 and index.dtype == torch.int64
    return is_index and isinstance(rows, Rows) and rows.axis == 0 and memo.has_at(rows, index, target.shape[0])


_HANDLERS: dict[str, Callable[[Step], Found]] = {
    **dict.fromkeys((*ALIGNED, *SAME_ENTRIES, *_UNARY.split()), entry_by_entry),
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(_ADDING, added),
    "__setitem__": _written,
    "as_strided": _strided,
    **adding.HANDLERS,
    **reductions.HANDLERS,
    **sparse.HANDLERS,
}
_TAKES_WHOLE = frozenset((_moved, entry_by_entry, reductions.where, _written, added, filled))
"""Functions that know tensors which belong to one sample as a whole."""


def has_index(name: str) -> bool:
    """Tell whether an index among the arguments of an operation says where entries go, whoever owns the index."""
    return name in _PICKS or name in sparse.MAKING or name.rstrip("_") in _ADDING


def moved_entries(name: str, args: Any, kwargs: Any, given: list[tuple[Tensor, Owners]]) -> list[Tensor]:
    """Return the arguments whose entries an indexed operation puts into its result; an empty list for other
    operations.
    """
    if name.rstrip("_") in _ADDING:
        return [tensor for tensor in (args[0], args[3] if len(args) > 3 else None) if isinstance(tensor, Tensor)]
    if name in _PICKS and args:
        return tensors_in((args[0],), {})
    if name in sparse.MAKING:  # values, or of constants the places
        owned = {id(tensor) for tensor, rows in given if rows is not None}
        return [one for one in sparse.entries_given(name, args, kwargs).values() if id(one) in owned][-1:]
    return []


def after_index(name: str, args: Any, given: list[tuple[Tensor, Owners]], memo: Memo) -> Rows | None:
    """Return the owners of rows that an index selects, or of sums of rows by an index; None for all other results.

    Args:
        name: of an operation that :func:`has_index` names.
        args: its arguments.
        given: the tensors among these, with their owners.
        memo: of the microbatch.
    """
    found: Owners = None
    tensor, first = given[0]
    if tensor is not args[0]:
        first = MIXED
    if name in _PICKS:
        found = rows_at(memo, name, args, first, tensor.dim()) if isinstance(first, Rows) else None
    elif len(given) == 3 and len(args) > 3 and given[2][0] is args[3]:
        (target, dim, index), rows = args[:3], given[2][1] or given[1][1]
        if not isinstance(first, Mixed) and not isinstance(rows, Mixed):
            found = after_adding(target, dim, index, first, rows, memo)
    return found if isinstance(found, Rows) else None


def handler_of(name: str) -> Callable[[Step], Found] | None:
    """Return the function that computes the owners of an operation's result; None for an unknown operation."""
    return _HANDLERS.get(name) or _HANDLERS.get(name.rstrip("_"))


def _fills(step: Step, handler: Callable[[Step], Found] | None) -> bool:
    """Tell whether an operation puts entries into a tensor without data that may have rows of all samples."""
    if handler not in (_written, added, filled):
        return False
    target = step.args[0]
    return 1 < len(step.identity) in target.shape and all(tensor is not target for tensor, _ in step.owned)


def owners_after(step: Step, handler: Callable[[Step], Found] | None, axis_after: AxisAfter | None) -> Found:
    """Return the owners of a finished operation's result, or of each tensor in the result."""
    first = step.owned[0][1]
    if first.only is not None and all(rows.only == first.only for _, rows in step.owned) and not _fills(step, handler):
        return Rows(None, first.index[:1])
    if len(step.identity) == 1 and all(rows.num == 1 and not rows.has_nobody for _, rows in step.owned):
        return Rows(None, first.index)  # in a batch of one record, whatever has no other rows is its as a whole
    if handler is None:
        if axis_after is None or len(step.owned) > 1 or first.axis is None:
            return MIXED
        axis = axis_after(step.owned[0][0], first.axis, step.args, step.kwargs, step.out)
        return MIXED if axis is None else first.moved(axis)
    takes = handler in _TAKES_WHOLE or all(rows.axis is not None for _, rows in step.owned)
    found = handler(step) if takes else MIXED
    if found is MIXED and len(soles := {rows.sole for _, rows in step.owned if rows.num}) == 1 and None not in soles:
        return Rows(None, first.index.new_tensor([*soles]))
    return found


__all__ = ["CONSTANTS", "Mixed", "Step", "handler_of", "owners_after"]
