"""Uses of an operation as its rule reads them: the rows of a sample next to each other, batch axis first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_dp.per_sample.owners.owned import OwnedAxis, arrangement, laid_out
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.tracking.uses import Recorder, Use


def call_of(recorder: Recorder, use: Use, backprop: Tensor) -> Call:
    """Return a use with its rows sample-major, batch axis first; the rows of one user form one sample."""
    size, joining, source = recorder.batch_size, recorder.joining, use.source
    backprop, rows = use.out_axis.to_front(backprop, size, source)
    if joining is not None:
        backprop = joining.backprops(backprop, rows)
    data = _as_it_is if joining is None else joining.data
    rows_of_one = rows if joining is None else joining.rows(rows)
    if use.arguments is not None:
        return Call((), use.arguments(size, data), backprop, backprop, rows_of_one)
    if not use.inputs:
        return Call((), {}, backprop, backprop, rows_of_one)
    assert use.in_axis is not None
    activation, in_rows = use.in_axis.to_front(use.inputs[0], size, source)
    assert rows == in_rows
    activation = data(activation, rows)
    return Call((activation,), {}, activation, backprop, rows_of_one)


def calls_of(recorder: Recorder, uses: Sequence[Use]) -> list[tuple[set[Hashable], list[Call]]]:
    """Return groups of keys that received the same backprops, with their calls."""
    if len(uses) == 1 == len(uses[0].parts):
        (use,), ((backprop, keys),) = uses, uses[0].parts
        return [({*keys}, [call_of(recorder, use, backprop)])]
    calls: dict[Hashable, list[Call]] = {}
    owned: dict[Any, list[tuple[Use, Tensor]]] = {}
    for use in uses:
        for backprop, keys in use.parts:
            if (axis := _owned(use)) is not None:
                shapes = [axis.rows(one).shape[1:] for one in (*use.inputs, backprop)]
                owned.setdefault((keys, *shapes), []).append((use, backprop))
                continue
            call = call_of(recorder, use, backprop)
            for key in keys:
                calls.setdefault(key, []).append(call)
    for (keys, *_), parts in owned.items():
        call = _joined(recorder, parts)
        for key in keys:
            calls.setdefault(key, []).append(call)
    merged: dict[tuple[int, ...], tuple[set[Hashable], list[Call]]] = {}
    for key, mine in calls.items():
        merged.setdefault(tuple(map(id, mine)), (set(), mine))[0].add(key)
    return list(merged.values())


def without(call: Call, dead: Tensor) -> Call:
    """Return the call with the rows of dropped samples set to zero, because 0 times a non-finite row is not 0."""
    rows = dead.repeat_interleave(call.multiplicity) if call.multiplicity > 1 else dead

    def cleared(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.masked_fill(rows.reshape(-1, *[1] * (tensor.dim() - 1)), 0.0)

    activation = cleared(call.activation)
    return replace(call, inputs=(activation, *call.inputs[1:]), activation=activation, backprop=cleared(call.backprop))


def _owned(use: Use) -> OwnedAxis | None:
    """Return the axis of a use whose rows belong to samples by an index; None for other uses."""
    return use.out_axis if isinstance(use.out_axis, OwnedAxis) and use.arguments is None else None


def _joined(recorder: Recorder, parts: list[tuple[Use, Tensor]]) -> Call:
    """Return uses whose rows belong to samples by an index as one use, with equally many rows per sample."""
    size = recorder.batch_size
    axes = [use.out_axis for use, _ in parts if isinstance(use.out_axis, OwnedAxis)]
    arranged = arrangement(axes, size)
    sides = [[axis.rows(backprop) for axis, (_, backprop) in zip(axes, parts, strict=True)]]
    if parts[0][0].inputs:
        sides.append([axis.rows(use.inputs[0]) for axis, (use, _) in zip(axes, parts, strict=True)])
    (backprop, rows), *inputs = (laid_out(side, arranged) for side in sides)
    joining = recorder.joining
    if joining is not None:
        backprop = joining.backprops(backprop, rows)
        inputs = [(joining.data(tensor, rows), rows) for tensor, _ in inputs]
        rows = joining.rows(rows)
    if not inputs:
        return Call((), {}, backprop, backprop, rows)
    return Call((inputs[0][0],), {}, inputs[0][0], backprop, rows)


def _as_it_is(tensor: Tensor, rows: int) -> Tensor:
    return tensor
