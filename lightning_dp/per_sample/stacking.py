"""Small per-sample gradients: computed together for all sources of equal shapes, and combined as one matrix.

For small tensors the calls of torch and of Python cost more than the arithmetic. So L sources with the same rule,
settings and shapes are computed as one source of ``L B`` samples, and the norms and weighted sums of all small
gradients are those of one matrix.

Legend: ``L`` sources of a stack, ``B`` samples of the microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import add_scaled
from lightning_dp.per_sample.combining import combine
from lightning_dp.per_sample.nodes import Region, view_of
from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.sources import Source
from lightning_dp.per_sample.uses import FEW

MOST_STACKED = 2**20
"""Numbers of all gradients that are computed in stacks: they are kept from the norms to the sums."""

Views = dict[Source, dict[Hashable, tuple[str, Region | None]]]
"""Name of the parameter and region of each view, by key, by source."""


class Part(NamedTuple):
    """The gradients of one tensor in a block.

    Args:
        name: qualified name of the parameter.
        region: of a view; None for the whole parameter.
        key: of the tensor: the parameter or a view of it.
    """

    name: str
    region: Region | None
    key: Hashable


class Block(NamedTuple):
    """Gradients of equal shapes.

    Args:
        parts: L tensors.
        grads: shape ``(L, B, *shape)``.
    """

    parts: Sequence[Part]
    grads: Tensor


def stacks_of(views: Views, masks: Collection[str], *, lean: bool) -> Iterator[tuple[list[Source], list[Block]]]:
    """Yield the small gradients of sources with equal rules and shapes, and keep them in these sources.

    Args:
        views: sources that received backprops.
        masks: names of masked parameters, which are left out.
        lean: whether a gradient must not have more numbers than its backprops.
    """
    groups: dict[Hashable, list[tuple[Source, list[Call]]]] = {}
    for source, keys in views.items():
        calls = small_calls(source, keys.keys(), lean=lean)
        if calls and not any(name in masks for name, _ in keys.values()):
            names = tuple(sorted(source.local[key] for key in keys))
            shapes = tuple(_shapes_of(call) for call in calls)
            alone = source if sum(map(_numbers_of, calls)) > FEW else None
            groups.setdefault((source.rule, source.spec, names, shapes, alone), []).append((source, calls))
    total = 0
    for members in groups.values():
        sources, each = [source for source, _ in members], [calls for _, calls in members]
        keys = views[sources[0]]
        size = sources[0].recorder.num_samples
        copied = sum(map(_numbers_of, each[0])) if len(each) > 1 else 0
        num = len(each) * (copied + size * sum(sources[0].nodes[key].numel for key in keys))
        if total + num > MOST_STACKED:
            continue
        total += num
        calls = each[0] if len(each) == 1 else [_stacked(uses) for uses in zip(*each, strict=True)]
        locals_ = {sources[0].local[key] for key in keys}
        made = sources[0].rule.per_sample(sources[0].spec, calls, len(members) * size, locals_)
        blocks, memories = [], [source.memory() for source in sources]
        for local, grads in made.items():
            grads = grads.reshape(len(members), size, *grads.shape[1:])
            parts = []
            for source, memory, grad in zip(sources, memories, grads.unbind(0), strict=True):
                key = source.key_of[local]
                memory[key] = grad
                parts.append(Part(*views[source][key], key))
            blocks.append(Block(parts, grads))
        yield sources, blocks


def small_calls(source: Source, keys: Collection[Hashable], *, lean: bool) -> list[Call] | None:
    """Return the calls of a source if the gradients of these keys are small and not computed; else None.

    Args:
        source: received backprops for the keys.
        keys: of tensors.
        lean: whether a gradient must not have more numbers than its backprops.
    """
    size = source.recorder.num_samples
    largest = size * max(source.nodes[key].numel for key in keys)
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


def _stacked(calls: Sequence[Call]) -> Call:
    """Return calls of equal shapes as one call, sample after sample."""
    backprop = torch.cat([call.backprop for call in calls])
    if calls[0].activation is calls[0].backprop:
        return replace(calls[0], inputs=(), activation=backprop, backprop=backprop)
    return replace(calls[0], inputs=(), activation=torch.cat([call.activation for call in calls]), backprop=backprop)


class Joined:
    """Small gradients next to each other in one matrix, shape ``(B, N)``: a norm and a sum for all of them.

    Args:
        blocks: gradients of equal shapes.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._shapes = [(block.parts, (len(block.parts), *block.grads.shape[2:])) for block in blocks]
        self._sizes = [math.prod(shape) for _, shape in self._shapes]
        rows = [block.grads.transpose(0, 1) for block in blocks]
        self.grads = torch.cat([row.reshape(len(row), num) for row, num in zip(rows, self._sizes, strict=True)], 1)

    def add_weighted_sum(
        self,
        factors: Tensor,
        dead: Tensor | None,
        out: Mapping[str, Tensor],
        masks: Collection[str],
    ) -> set[tuple[str, Hashable]]:
        """Add ``sum_i factors[i] gradient_i`` to the targets; return the names and keys of the parts that were added.

        Args:
            factors: shape ``(B,)``.
            dead: marks the samples of factor 0; None if there are none.
            out: accumulation targets by name.
            masks: names of masked parameters, whose parts are left to the caller.
        """
        done: set[tuple[str, Hashable]] = set()
        targets: list[Tensor] = []
        added: list[Tensor] = []
        sums = torch.split(combine(self.grads, factors, dead), self._sizes)
        for (parts, shape), total in zip(self._shapes, sums, strict=True):
            for (name, region, key), part in zip(parts, total.view(shape).unbind(0), strict=True):
                if name not in masks and (region is None or out[name].is_contiguous()):
                    targets.append(view_of(out[name], region))
                    added.append(part)
                    done.add((name, key))
        if targets:
            add_scaled(targets, added, 1.0)
        return done
