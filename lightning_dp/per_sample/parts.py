"""Per-sample gradients of whole parameters, put together from those of the tensors that operations use.

A parameter may be used through views, through functions of it, and in several operations. If the tensors used are
disjoint parts of it, norms and sums are those of the parts; else all parts are added first, since cross terms count.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import number_in, real_view
from lightning_dp.per_sample.combining import add_combined, is_joined, norm_of
from lightning_dp.per_sample.pulling import pulled_back
from lightning_dp.per_sample.rules.base import squared_norm
from lightning_dp.per_sample.sources import Source
from lightning_dp.per_sample.stacking import Gradient, Joined, Part, Views, stacks_of
from lightning_dp.per_sample.tracking.nodes import Node, Region, view_of
from lightning_dp.per_sample.tracking.tracker import Tracker

_MOST_KNOWN = 64
"""Kinds of steps whose parts are remembered."""


class Parts:
    """The parts of private parameters that backprops have reached in a microbatch.

    Args:
        tracker: follows the parameters; its sources hold the backprops.
        lean: whether only gradients that have no more numbers than their backprops are kept.
    """

    def __init__(self, tracker: Tracker, *, lean: bool = False) -> None:
        self._lean = lean
        self._tracker, self._recorder = tracker, tracker.recorder
        self._known_disjoint: dict[Hashable, bool] = {}
        self._whole: dict[str, Tensor] = {}  # gradients of parameters that are used in several ways
        self._joined: dict[tuple[str, ...], Joined] = {}  # gradients with few numbers, by group
        # by names, masks and parts with backprops
        self._known_sorted: dict[Hashable, tuple[Views, dict[str, Part]]] = {}
        self._passes = False  # whether some of these parts are functions of parameters, which end with the microbatch
        self._live: tuple[tuple[Source, frozenset[Hashable]], ...] | None = None  # keys with backprops
        self._by_name: dict[str, list[tuple[Source, Node]]] = {}
        self._at = -1  # gradients and parts are of the backprops up to that change

    @property
    def _parameters(self) -> Mapping[str, nn.Parameter]:
        return self._tracker.parameters

    def clear(self) -> None:
        """Free the gradients."""
        self._whole, self._joined, self._live, self._by_name = {}, {}, None, {}
        if self._passes:
            self._known_sorted, self._passes = {}, False

    def _forget_older(self) -> None:
        """Forget what was computed before the last backprop arrived."""
        if self._at != self._recorder.changes:
            self.clear()
            self._at = self._recorder.changes

    def _arrived(self) -> tuple[tuple[Source, frozenset[Hashable]], ...]:
        """Return the sources that received backprops, each with the keys for which they did."""
        self._forget_older()
        if self._live is None:
            sources = self._tracker.sources.values()
            self._live = tuple([(source, live) for source in sources if (live := source.live())])
            for source, live in self._live:
                for key in live:
                    for name in source.nodes[key].names:
                        self._by_name.setdefault(name, []).append((source, source.nodes[key]))
        return self._live

    def of(self, names: Collection[str]) -> dict[str, list[tuple[Source, Node]]]:
        """Return, by parameter, its derived tensors that received backprops, with their sources."""
        self._arrived()
        return {name: parts for name, parts in self._by_name.items() if name in names}

    def discard(self, names: Iterable[str]) -> None:
        """Forget the backprops received so far for these parameters.

        Raises:
            PrivacyError: one gradient belongs to these and to other parameters.
        """
        self.clear()
        chosen = frozenset(names)
        everything = chosen.issuperset(self._parameters)
        for source in self._tracker.sources.values():
            if everything:
                source.discard(source.keys)
                continue
            if not source.live():
                continue
            gone = set()
            for key, node in source.nodes.items():
                if chosen.issuperset(node.names):
                    gone.add(key)
                elif not chosen.isdisjoint(node.names) and key in source.live():
                    raise PrivacyError(
                        f"Expected the parameters of {node.name!r} in one optimizer, got some in another. Their "
                        "gradients come from one computation; train them together."
                    )
            source.discard(frozenset(gone))

    def squared_norms(
        self, sums: Tensor, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask]
    ) -> Tensor:
        """Add the squared norms of the parameters of each group to ``sums`` of shape ``(G, B)``, and return it."""
        self._forget_older()
        norms: dict[str, Tensor] = {}
        rows_of: dict[str, list[int]] = {}
        for number, group in enumerate(groups):
            for name in group:
                rows_of.setdefault(name, []).append(number)
        small: list[list[Gradient]] = [[] for _ in groups]
        views, whole = self._sorted(set(rows_of), masks)
        stacked: set[Source] = set()
        gradients: list[Gradient] = []
        for sources, made_together in stacks_of(views, masks, lean=self._lean):
            stacked.update(sources)
            gradients += made_together
        for source, parts in views.items():
            if source in stacked:
                continue
            mine = {key: masks[part.name] for key, part in parts.items() if part.name in masks}
            made, few = source.squared_norms(set(parts), mine)
            for key, norm in made.items():
                name = parts[key].name
                norms[name] = norms[name] + norm if name in norms else norm
            gradients += [(parts[key], grad) for key, grad in few.items()]
        for name, grad in self._gathered(whole.keys()).items():
            if is_joined(grad, masks.get(name)):
                gradients.append((whole[name], grad))
            else:
                norms[name] = norm_of(grad, masks.get(name))
        for gradient in gradients:
            for number in rows_of[gradient[0].name]:
                small[number].append(gradient)
        for row, group, few_numbers in zip(sums, groups, small, strict=True):
            if few_numbers:
                joined = self._joined[tuple(group)] = Joined(few_numbers)
                row += squared_norm(joined.grads)
            for name in group:
                if name in norms:
                    row += norms[name]
        return sums

    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask],
        scratch: Mapping[str, Tensor],
    ) -> None:
        """Add weighted sums; see ``GradientEngine.accumulate``."""

        def target(name: str, *, direct: bool = True) -> Tensor:
            """Return the tensor that receives the weighted sum of a whole parameter."""
            if name not in masks and direct:
                return out[name]
            if scratch:
                return scratch[name].zero_()
            return torch.zeros_like(real_view(self._parameters[name].detach()), dtype=out[name].dtype)

        def take(name: str, total: Tensor) -> None:
            if total is not out[name]:
                out[name].add_(masks[name].select(total) if name in masks else total)

        self._forget_older()
        dead = factors == 0 if number_in(factors.count_nonzero()) < factors.numel() else None
        for row, group in enumerate(groups):
            lost = None if dead is None else dead[row]
            joined = self._joined.get(tuple(group))
            done: set[Hashable] = set() if joined is None else joined.add_weighted_sum(factors[row], lost, out, masks)
            views, whole = self._sorted(set(group), masks)
            for source, parts in views.items():
                keys = parts.keys() - done
                if not keys:
                    continue
                masked = {key: name for key in keys if (name := parts[key].name) in masks}
                rows = {key: out[name] for key, name in masked.items()}
                mine = {key: masks[name] for key, name in masked.items()}
                rest = keys - source.add_active_entries(rows, mine, factors[row], lost)
                sums: dict[str, Tensor] = {}
                for name, region, *_ in map(parts.__getitem__, rest):
                    if name not in sums:
                        sums[name] = target(name, direct=region is None or out[name].is_contiguous())
                targets = {key: view_of(sums[parts[key].name], parts[key].region) for key in rest}
                source.add_weighted_sum(targets, factors[row], lost)
                for name, total in sums.items():
                    take(name, total)
            for name, grad in self._gathered(whole.keys() - done).items():
                total = target(name)
                add_combined(total, grad, factors[row], lost)
                take(name, total)

    def _sorted(self, names: set[str], masks: Mapping[str, ParameterMask]) -> tuple[Views, dict[str, Part]]:
        """Return the sources of disjoint views of parameters, and the parameters whose whole gradient is needed.

        A parameter that is seen through views needs all of it under a mask: the masked norm and the masked sum of a
        view come from different products, whose rounding no norm covers.
        """
        live = self._arrived()
        asked = frozenset(names), frozenset(masks), live
        if asked in self._known_sorted:
            return self._known_sorted[asked]
        if len(self._known_sorted) >= _MOST_KNOWN:
            self._known_sorted.clear()
        views: Views = {}
        whole: dict[str, Part] = {}
        ranks = {name: rank for rank, name in enumerate(self._parameters)}
        for name, parts in self.of(names).items():
            through_views = name in masks and any(node.region is not None for _, node in parts)
            if (
                through_views
                or not all(node.is_view for _, node in parts)
                or not self._disjoint(name, [node for _, node in parts])
            ):
                whole[name] = Part(name, None, name, (ranks[name], 0))
                continue
            for source, node in parts:
                rank = ranks[name], node.region[0] if node.region else 0
                views.setdefault(source, {})[node.key] = Part(name, node.region, node.key, rank)
        self._known_sorted[asked] = views, whole
        self._passes |= not all(source.is_lasting for source, _ in live)
        return views, whole

    def _disjoint(self, name: str, nodes: Sequence[Node]) -> bool:
        if len(nodes) == 1:
            return True
        key = (name, *(node.region for node in nodes))
        if key not in self._known_disjoint:
            counts = torch.zeros(self._parameters[name].shape, dtype=torch.int32)
            for node in nodes:
                view_of(counts, node.region).add_(1)
            self._known_disjoint[key] = bool((counts <= 1).all())
        return self._known_disjoint[key]

    def _gathered(self, names: Set[str]) -> dict[str, Tensor]:
        """Return per-sample gradients with all contributions added, because cross terms count."""
        self._forget_older()
        # norms and weighted sum are taken from the same tensor: nothing is lost where parts cancel
        if missing := names - self._whole.keys():
            self._whole.update(self.computed(missing))
        return {name: self._whole[name] for name in names & self._whole.keys()}

    def computed(self, names: Set[str]) -> dict[str, Tensor]:
        """Return the gradients ``(B, *shape)`` of those of these parameters that a backprop has reached."""
        parts = self.of(names)
        functions = {node: source for mine in parts.values() for source, node in mine if not node.is_view}
        grads = ((node, source.cached({node})[node]) for node, source in functions.items())
        total = pulled_back(self._tracker, grads, names)
        for name, mine in parts.items():
            for source, node in mine:
                if not node.is_view:
                    continue
                grad = source.cached({node.key})[node.key]
                if node.key != name:
                    part, (offset, shape, strides) = grad, _region(node)
                    grad = part.new_zeros(len(part), *self._parameters[name].shape)
                    grad.as_strided((len(part), *shape), (grad[:1].numel(), *strides), offset).copy_(part)
                total[name] = total[name] + grad if name in total else grad
        return total


def _region(node: Node) -> Region:
    assert node.region is not None
    return node.region
