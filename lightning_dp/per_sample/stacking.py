"""Small per-sample gradients: computed together for all sources of equal shapes, and combined as one matrix.

For small tensors the calls of torch and of Python cost more than the arithmetic. So L sources with the same rule,
settings and shapes are computed as one source of ``L B`` samples, and the norms and weighted sums of all small
gradients are those of one matrix.

Legend: ``L`` sources of a stack, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import add_scaled
from lightning_dp.per_sample.combining import combine
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.sources import Source
from lightning_dp.per_sample.targets import Targets
from lightning_dp.per_sample.tracking.nodes import Region, view_of
from lightning_dp.per_sample.tracking.uses import FEW

MOST_STACKED = 2**20
"""Numbers of all gradients that are computed in stacks: they are kept from the norms to the sums."""


class Part(NamedTuple):
    """A parameter, or a view of one, that is disjoint from all other parts.

    Args:
        name: qualified name of the parameter.
        region: of a view; None for the whole parameter.
        key: of the tensor: the parameter or a view of it.
        rank: of the part in the order of the parameters and, within one, of their entries.
    """

    name: str
    region: Region | None
    key: Hashable
    rank: tuple[int, int]


Views = dict[Source, dict[Hashable, Part]]
"""Parts by key, by source."""

Gradient = tuple[Part, Tensor]
"""A part with its per-sample gradients, shape ``(B, *shape)``."""


def stacks_of(views: Views, masks: Collection[str], *, lean: bool) -> Iterator[tuple[list[Source], list[Gradient]]]:
    """Yield the small gradients of sources with equal rules and shapes, and keep them in these sources.

    Args:
        views: sources that received backprops.
        masks: names of masked parameters, which are left out.
        lean: whether a gradient must not have more numbers than its backprops.
    """
    groups: dict[tuple[Any, ...], list[tuple[Source, list[Call]]]] = {}
    for source, parts in views.items():
        calls = small_calls(source, parts.keys(), lean=lean)
        if calls and not (masks and any(part.name in masks for part in parts.values())):
            names = frozenset(map(source.local.__getitem__, parts))
            shapes = tuple(map(_shapes_of, calls))
            alone = source if sum(map(_numbers_of, calls)) > FEW else None
            groups.setdefault((source.rule, source.spec, names, shapes, alone), []).append((source, calls))
    total = 0
    for (_, _, locals_, *_), members in groups.items():
        (first, calls), size, num = members[0], members[0][0].recorder.num_samples, len(members)
        copied = sum(map(_numbers_of, calls)) if num > 1 else 0
        numbers = num * (copied + size * sum(first.nodes[key].numel for key in views[first]))
        if total + numbers > MOST_STACKED:
            continue
        total += numbers
        if num > 1:
            calls = [_stacked(uses, size) for uses in zip(*(calls for _, calls in members), strict=True)]
        gradients: list[Gradient] = []
        for local, grads in first.rule.per_sample(first.spec, calls, num * size, set(locals_)).items():
            each = (grads,) if num == 1 else grads.reshape(size, num, *grads.shape[1:]).unbind(1)
            for (source, _), grad in zip(members, each, strict=True):
                key = source.key_of[local]
                source.memory()[key] = grad
                gradients.append((views[source][key], grad))
        yield [source for source, _ in members], gradients


def small_calls(source: Source, keys: Collection[Hashable], *, lean: bool) -> list[Call] | None:
    """Return the calls of a source if the gradients of these keys are small and not computed; else None.

    Args:
        source: received backprops for the keys.
        keys: of tensors.
        lean: whether a gradient must not have more numbers than its backprops.
    """
    largest = source.recorder.num_samples * max([source.nodes[key].shape.numel() for key in keys])
    if not 0 < largest <= FEW or source.materialises or not source.rule.is_stackable or source.memory():
        return None
    if len(groups := source.groups()) != 1:
        return None
    held, calls = groups[0]
    if not held.issuperset(keys) or calls[0].backprop.is_complex():
        return None
    return None if lean and largest > sum(call.backprop.numel() for call in calls) else calls


def _shapes_of(call: Call) -> Hashable:
    activation, backprop = call.activation, call.backprop
    return activation.shape, activation.dtype, call.multiplicity, backprop.shape, backprop.dtype, backprop.device


def _numbers_of(call: Call) -> int:
    return call.activation.numel() + call.backprop.numel()


def _stacked(calls: Sequence[Call], size: int) -> Call:
    """Return calls of equal shapes as one call: of each sample, the rows of all calls next to each other."""
    backprop = _next_to_each_other([call.backprop for call in calls], size)
    same = calls[0].activation is calls[0].backprop
    activation = backprop if same else _next_to_each_other([call.activation for call in calls], size)
    return replace(calls[0], inputs=(), activation=activation, backprop=backprop)


def _next_to_each_other(tensors: list[Tensor], size: int) -> Tensor:
    shape = tensors[0].shape
    if len(shape) < 2 or shape[0] != size:
        tensors = [tensor.reshape(size, -1) for tensor in tensors]
    return torch.cat(tensors, 1).reshape(len(tensors) * shape[0], *shape[1:])


class Joined:
    """Small gradients next to each other in one matrix, shape ``(B, N)``: a norm and a sum for all of them.

    Args:
        gradients: of disjoint parts.
    """

    def __init__(self, gradients: Sequence[Gradient]) -> None:
        ordered = sorted(gradients, key=_rank_of)
        self.parts = [(part, grads.shape[1:]) for part, grads in ordered]
        rows = [
            grads if grads.dim() == 2 else grads.reshape(grads.shape[0], shape.numel())
            for (_, grads), (_, shape) in zip(ordered, self.parts, strict=True)
        ]
        self.grads = torch.cat(rows, 1)

    def add_weighted_sum(
        self,
        factors: Tensor,
        dead: Tensor | None,
        out: Mapping[str, Tensor],
        masks: Collection[str],
    ) -> set[Hashable]:
        """Add ``sum_i factors[i] gradient_i`` to the targets; return the keys of the parts that were added.

        Args:
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.
            out: accumulation targets by name.
            masks: names of masked parameters, whose parts are left to the caller.
        """
        total = combine(self.grads, factors, dead)
        done: set[Hashable] = set()
        targets: list[Tensor] = []
        added: list[Tensor] = []
        runs: list[tuple[int, int, int]] = []  # parts in a row: first column, end, first number in the buffer
        low = high = 0
        for part, shape in self.parts:
            low, high = high, high + shape.numel()
            start = out.start(part.name, part.region) if isinstance(out, Targets) else None
            if part.name in masks or not (start is not None or part.region is None or out[part.name].is_contiguous()):
                continue
            done.add(part.key)
            if start is None:
                targets.append(view_of(out[part.name], part.region))
                added.append(total[low:high].view(shape))
            elif runs and runs[-1][1] == low and runs[-1][2] - runs[-1][0] == start - low:
                runs[-1] = (runs[-1][0], high, runs[-1][2])
            else:
                runs.append((low, high, start))
        if isinstance(out, Targets):
            targets += [out.flat[start : start + high - low] for low, high, start in runs]
            added += [total[low:high] for low, high, _ in runs]
        add_scaled(targets, added, 1.0)
        return done


def _rank_of(gradient: Gradient) -> tuple[int, int]:
    return gradient[0].rank
