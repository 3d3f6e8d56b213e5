"""The pull-back of per-sample gradients through functions of private parameters, to the parameters.

The pull-back is a vector-Jacobian product of the graph of a function, mapped over the samples. Of a function with a
single entry the Jacobian is one row, and of one that is computed entry by entry it is a diagonal. Then one product,
with ones, gives the Jacobian, and the gradients of all samples are multiplied by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_dp._messages import without_warnings
from lightning_dp.per_sample._torch import unreported
from lightning_dp.per_sample.rules.base import widen
from lightning_dp.per_sample.tracking.nodes import Node

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

MOST_AT_ONCE = 2**24
"""Numbers that a pull-back holds at once."""

_MOST_PASSES = 4
"""Products without a map, which cost about a quarter of a mapped one each."""


def pulled_back(tracker: Tracker, grads: Iterable[tuple[Node, Tensor]], names: Collection[str]) -> dict[str, Tensor]:
    """Return per-sample gradients ``(B, *shape)`` of parameters: the sum over functions of them.

    Args:
        tracker: holds the stand-ins of the parameters.
        grads: functions with their per-sample gradients, ``(B, *shape)``; read while few are held at once.
        names: parameters whose gradients are asked for; those that no function reaches are left out.
    """
    total: dict[str, Tensor] = {}
    for group in _groups(tracker, grads):
        reached = [name for name in dict.fromkeys(name for node in group for name in node.names) if name in names]
        kinds: list[Mapping[str, Tensor]] = [tracker.stand_ins]
        if tracker.has_custom:  # a torch.autograd.Function takes the parameters themselves
            kinds.append(tracker.parameters)
        for kind in kinds:
            roots = {name: kind[name] for name in reached if name in kind}
            if roots:
                total = _added([total, _pulled_together(group, roots)])
    return total


def _groups(tracker: Tracker, grads: Iterable[tuple[Node, Tensor]]) -> Iterator[dict[Node, Tensor]]:
    """Yield functions whose gradients are pulled back in one pass, few enough for a bounded memory; functions of
    parameters of lower precision one by one, because a pass adds up in their type.
    """
    group: dict[Node, Tensor] = {}
    held = 0
    for node, grad in grads:
        dtypes = {node.dtype, *(tracker.parameters[name].dtype for name in node.names)}
        narrow = any(dtype.itemsize < 4 for dtype in dtypes)
        if group and (narrow or held + grad.numel() > MOST_AT_ONCE):
            yield group
            group, held = {}, 0
        group[node] = grad
        held += grad.numel()
        if narrow:
            yield group
            group, held = {}, 0
    if group:
        yield group


def _pulled_together(group: Mapping[Node, Tensor], roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the gradients that some functions pass back to parameters."""
    size = len(next(iter(group.values())))
    if size == 0:
        empty = next(iter(group.values()))
        return {name: empty.new_zeros(0, *root.shape) for name, root in roots.items()}
    passes, rest = _without_map(group, roots)
    parts = [_multiplied(one, roots) for one in passes]
    return _added([*parts, _mapped(rest, roots)] if rest else parts)


def _without_map(
    group: Mapping[Node, Tensor], roots: Mapping[str, Tensor]
) -> tuple[list[dict[Node, Tensor]], dict[Node, Tensor]]:
    """Return the functions whose Jacobian is one row or a diagonal, in passes of which no two share a parameter; and
    all other functions.
    """
    passes: list[dict[Node, Tensor]] = []
    taken: list[set[str]] = []
    rest: dict[Node, Tensor] = {}
    for node, grad in group.items():
        at = next((at for at, names in enumerate(taken) if names.isdisjoint(node.names)), len(passes))
        simple = node.numel == 1 or (
            node.is_entrywise and all(roots[name].dtype == node.dtype for name in node.names if name in roots)
        )
        if not simple or at == _MOST_PASSES or not node.dtype.is_floating_point or grad.dtype.itemsize < 4:
            rest[node] = grad
            continue
        if at == len(passes):
            passes.append({})
            taken.append(set())
        passes[at][node] = grad
        taken[at].update(node.names)
    return passes, rest


def _multiplied(group: Mapping[Node, Tensor], roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients that functions without common parameters pass back, whose Jacobian is one row or a
    diagonal.
    """
    ones = [grad.new_ones(node.shape, dtype=node.dtype) for node, grad in group.items()]
    jacobian = dict(zip(roots, _vjp(group, roots, ones), strict=True))
    found: dict[str, Tensor] = {}
    for node, grad in group.items():
        for name in node.names:
            if (one := jacobian.get(name)) is not None:
                one = widen(one)
                grads = grad if node.numel != 1 else grad.reshape(grad.shape[0], *[1] * one.dim())
                found[name] = grads.to(one.dtype) * one
    return found


def _mapped(group: Mapping[Node, Tensor], roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the sum of the gradients that functions pass back in products mapped over the samples."""
    cotangents = [grad.to(node.dtype) for node, grad in group.items()]
    largest = max(*(node.numel for node in group), *(root.numel() for root in roots.values()), 1)
    step = max(1, MOST_AT_ONCE // largest)
    pieces: list[Sequence[Tensor | None]] = []
    for part in zip(*(torch.split(cotangent, step) for cotangent in cotangents), strict=True):
        try:
            pieces.append(_vjp(group, roots, part, batched=True))
        except Exception:  # an operation whose backward cannot be mapped
            if len(group) > 1:
                return _added([_mapped({node: grad}, roots) for node, grad in group.items()])
            singles = [_vjp(group, roots, one) for one in zip(*part, strict=True)]
            pieces.append([None if s[0] is None else torch.stack(s) for s in zip(*singles, strict=True)])
    return {
        name: widen(found[0] if len(found) == 1 else torch.cat(found))
        for name, found in zip(roots, zip(*pieces, strict=True), strict=True)
        if found[0] is not None
    }


def _vjp(
    nodes: Iterable[Node], roots: Mapping[str, Tensor], given: Sequence[Tensor], *, batched: bool = False
) -> Sequence[Tensor | None]:
    values: Any = [GradientEdge(*node.value) for node in nodes]  # type: ignore[misc]
    with without_warnings(), unreported():  # warnings of operations that are mapped slowly
        return torch.autograd.grad(
            values, [*roots.values()], given, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )


def _added(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, grad in part.items():
            total[name] = total[name] + grad if name in total else grad
    return total
