"""Reduction for modules whose parameters are sharded over the processes (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.clipping import Clipping
from lightning_dp.masks import ParameterMask
from lightning_dp.step import units
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.reduction import AllReduce, communicating, squared_length
from lightning_dp.step.sharded_accumulator import ShardedAccumulator
from lightning_dp.system.local import is_sharded, local_part, own_rows


class Shards(AllReduce):
    """Reduction by one reduce-scatter per parameter and microbatch, which gives each rank the sum of its own rows.

    Forwards and backwards gather the parameters unit by unit. Each rank holds whole samples, so it computes their norms
    by itself; only the parameters are gathered again if they are needed. The weighted sum is computed for one unit at a
    time, for all rows, and scattered at once.

    **Guarantee**: every rank makes the same collectives in the same order, whatever samples it drew. Own rows carry
    noise of the full std, drawn by this rank alone. Replicated parameters carry noise of std / sqrt(W) on each rank,
    which the all-reduce of the release adds up.

    Args:
        module: the user's, sharded with ``fully_shard``, on its device.
        rank: number of this process.
        world_size: W.
        device: where tensors of the group's collectives are.
    """

    is_sharded = True

    def __init__(self, module: nn.Module, rank: int, world_size: int, device: torch.device) -> None:
        super().__init__(rank, world_size, device)
        self._module = module
        self._sharded = {name: p for name, p in module.named_parameters() if is_sharded(p)}
        self._units = units.find_units(module)
        self._whole = {name: p for unit in self._units for name, p in unit.whole.items()}
        self._names = [name for name, _ in module.named_parameters()]
        self._turns: list[tuple[list[str], units.Unit, bool]] = []  # of the norms that were asked for last

    # ---------------------------------------------------------------- what every rank has to do alike

    @override
    def same_count(self, num: int) -> int:
        return int(self._largest([num])[0])

    @override
    def any(self, flag: bool) -> bool:
        return bool(self._largest([int(flag)])[0])

    def _largest(self, values: Sequence[int]) -> list[int]:
        found = torch.tensor(values, device=self.device)
        with communicating("a microbatch"):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    @override
    def settle(self) -> None:
        units.settle(self._module)

    @override
    def recover(self) -> None:
        units.recover(self._module)

    # ---------------------------------------------------------------- norms and sums

    @override
    def watch(self, engine: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        whole = {name: self._whole.get(name, parameter) for name, parameter in parameters.items()}
        for name in whole.keys() & self._whole.keys():
            if whole[name].requires_grad != parameters[name].requires_grad:
                whole[name].requires_grad_(parameters[name].requires_grad)
        engine.set_parameters(whole, gathered=self._whole.keys())

    @override
    def make_accumulator(
        self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int
    ) -> Accumulator:
        ordered = sorted(parameters, key=lambda name: name not in self._sharded)  # stable
        return ShardedAccumulator({name: parameters[name] for name in ordered}, clipping, num_statistics)

    @override
    def squared_norms(
        self, engine: Any, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        self._turns = self._in_turn(engine, {name for group in groups for name in group})
        parts: list[Tensor] = []
        for names, unit, recomputes in self._turns:
            with unit.gathered(recomputes):
                parts.append(engine.squared_norms(_within(groups, names), masks))
        return torch.stack(parts).sum(0)

    @override
    def accumulate(self, engine: Any, weights: Tensor | None, accumulator: Accumulator) -> None:
        assert isinstance(accumulator, ShardedAccumulator)
        views, groups = accumulator.views, accumulator.groups
        if weights is None:  # the other ranks communicate for their norms
            self.squared_norms(engine, groups)
        # functions of parameters may join several units
        frees = not any(recomputes for _, _, recomputes in self._turns)
        for names, unit, recomputes in self._turns:
            segments, whole = self._segments(names, accumulator.gradient)
            masks = {name: mask for name, mask in accumulator.masks_of_norms.items() if name in segments}
            out = whole | {name: whole[name].new_zeros(mask.num_active) for name, mask in masks.items()}
            if weights is not None:
                with unit.gathered(recomputes):
                    engine.accumulate(weights, _within(groups, names), out, masks)
                for name, mask in masks.items():
                    segments[name][mask.indices] = out[name]
                if frees:
                    engine.discard(names)
            elif recomputes:
                with unit.gathered():
                    pass
            for name, segment in segments.items():
                accumulator.add_rows(views[name], name, self._scattered(name, segment))

    def _in_turn(self, engine: Any, names: Collection[str]) -> list[tuple[list[str], units.Unit, bool]]:
        """Return the units that hold any of these names, last unit first, then replicated parameters as one unit.

        The third value of each item tells whether any rank needs the unit's parameters gathered to compute gradients.
        """
        found = [([name for name in unit.whole if name in names], unit) for unit in reversed(self._units)]
        found = [(own, unit) for own, unit in found if own]
        recomputed = engine.recomputed()
        flags = self._largest([int(not recomputed.isdisjoint(own)) for own, _ in found]) if found else []
        parts = [(own, unit, bool(flag)) for (own, unit), flag in zip(found, flags, strict=True)]
        rest = [name for name in names if name not in self._whole]
        return [*parts, (rest, units.Unit(None, {}), False)] if rest else parts

    def _segments(self, names: Sequence[str], like: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return zeros for the sums of a unit: flat, padded to equal rows per rank, and as views in the parameters'
        shapes.
        """
        shapes = {name: self._shape(name) for name in names}
        lengths = []
        for name, shape in shapes.items():
            rows = shape[0] if name in self._sharded else 1
            padded = math.ceil(rows / self.world_size) * self.world_size if name in self._sharded else 1
            lengths.append(shape.numel() // max(rows, 1) * padded)
        segments = dict(zip(names, torch.split(like.new_zeros(sum(lengths)), lengths), strict=True))
        return segments, {name: segments[name][: shape.numel()].view(shape) for name, shape in shapes.items()}

    def _shape(self, name: str) -> torch.Size:
        return self._sharded[name].shape if name in self._sharded else self._module.get_parameter(name).shape

    def _scattered(self, name: str, segment: Tensor) -> Tensor:
        """Return this rank's rows of a sum over all ranks, flat; return the sum of a replicated parameter unchanged."""
        if name not in self._sharded:
            return segment
        parameter: Any = self._sharded[name]
        own = segment.new_empty(segment.numel() // self.world_size)
        with communicating("the sum of a microbatch"):
            _reduce_scatter(own, segment, parameter.device_mesh.get_group())
        return own[: local_part(parameter).numel()]

    # ---------------------------------------------------------------- the release

    @override
    def reduce(self, accumulator: Accumulator) -> None:
        """Sum replicated parameters and statistics over ranks; own rows already hold the sum of all ranks."""
        assert isinstance(accumulator, ShardedAccumulator)
        replicated = accumulator.flat[accumulator.num_sharded :]
        if replicated.numel():
            with communicating("the sum of a logical step"):
                dist.all_reduce(replicated)

    @override
    def squared_norm(self, accumulator: Accumulator) -> tuple[float, int]:
        assert isinstance(accumulator, ShardedAccumulator)
        num = accumulator.num_sharded
        own, rest = accumulator.gradient[:num], accumulator.gradient[num:]
        figures = torch.tensor([squared_length(own), num], dtype=torch.float64, device=self.device)
        dist.all_reduce(figures)
        squared, counted = figures.tolist()
        return squared + squared_length(rest), int(counted) + rest.numel()

    # ---------------------------------------------------------------- trials

    @override
    def per_sample_gradients(self, engine: Any, names: Sequence[str]) -> dict[str, Tensor]:
        """Return this rank's rows of per-sample gradients, each computed as a weighted sum over one sample."""
        zeros = self.squared_norms(engine, [list(names)])[0].mul(0.0).nan_to_num()
        parameters = dict(self._module.named_parameters())
        chosen = {name: parameters[name] for name in names}
        sums = []
        for sample in range(len(zeros)):
            factors = zeros.clone()
            factors[sample] = 1.0
            sums.append(self.weighted_sum(engine, factors, chosen))
        return {name: torch.stack([each[name] for each in sums]) for name in sums[0]} if sums else {}

    @override
    def weighted_sum(self, engine: Any, factors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for names, unit, recomputes in self._in_turn(engine, parameters):
            _, out = self._segments(names, factors)
            with unit.gathered(recomputes):
                engine.accumulate(factors[None], [names], out)
            sums.update({name: own_rows(out[name], parameters[name]).clone() for name in names if self._compares(name)})
        return sums

    @override
    def parts(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: local_part(gradient) for name, gradient in gradients.items() if self._compares(name)}

    def _compares(self, name: str) -> bool:
        """Tell whether this rank compares a parameter; only rank 0 compares replicated ones."""
        return name in self._sharded or self.rank == 0

    @override
    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not parts:
            return {}
        empty = torch.zeros_like(next(iter(parts.values())))
        stacked = torch.stack([parts.get(name, empty) for name in self._names]).to(self.device)
        dist.all_reduce(stacked)
        return dict(zip(self._names, stacked.to(empty.device), strict=True))


def _reduce_scatter(own: Tensor, segment: Tensor, group: Any) -> None:
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # before 2.13
    getattr(dist, name)(own, segment, group=group)


def _within(groups: Sequence[Sequence[str]], names: Collection[str]) -> list[list[str]]:
    chosen = set(names)
    return [[name for name in group if name in chosen] for group in groups]
