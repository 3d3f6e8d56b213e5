"""ShardedAccumulator: the accumulator of one rank's part of a sharded module."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.clipping import Clipping
from lightning_dp.masks import ParameterMask
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.system.local import is_sharded, own_rows


class ShardedAccumulator(Accumulator):
    """An accumulator of one rank's parts: its rows of sharded parameters, then whole replicated parameters.

    Args:
        parameters: qualified name -> parameter, sharded ones first.
        clipping: how one sample's gradient is bounded at the start of the run.
        num_statistics: number of statistics behind the gradient.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int = 0) -> None:
        super().__init__(parameters, clipping, num_statistics)
        self.sharded = [name for name, parameter in parameters.items() if is_sharded(parameter)]
        self._whole_masks: dict[str, ParameterMask] = {}

    @override
    def set_masks(self, masks: Sequence[Mapping[str, Tensor]], version: tuple[Hashable, ...]) -> None:
        """Set the active coordinates, both of whole gradients and of this rank's rows."""
        whole: dict[str, Tensor] = {}
        for mask in masks:
            for name in mask.keys() & self.parameters.keys():
                active = mask[name].to(self._device)
                whole[name] = whole[name] & active if name in whole else active
        self._whole_masks = {name: ParameterMask(active) for name, active in whole.items() if not bool(active.all())}
        super().set_masks([{name: own_rows(active, self.parameters[name]) for name, active in whole.items()}], version)

    @property
    @override
    def masks_of_norms(self) -> dict[str, ParameterMask]:
        """Masks for the norms of whole per-sample gradients, by parameter name."""
        return self._whole_masks

    @property
    @override
    def group_sizes(self) -> list[int]:
        """Number of active coordinates in each group, over all ranks."""
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        sizes |= {name: mask.num_active for name, mask in self._whole_masks.items()}
        return [sum(sizes[name] for name in group) for group in self.groups]

    @property
    def num_sharded(self) -> int:
        """Number of active coordinates in this rank's sharded rows, which come first in the gradient."""
        return sum(self._active_sizes[name] for name in self.sharded)

    @override
    def noise_parts(self, shares: Sequence[float], share: float = 1.0) -> list[tuple[Tensor, float]]:
        """Return slices of the gradient with their noise factors: 1 on own rows, a share on replicated parameters."""
        if shares:
            factors, own = self.factors_by_name(shares), set(self.sharded)
            return [(v, factors[n] * (1.0 if n in own else share)) for n, v in self.views.items() if v.numel()]
        rows, rest = self.gradient[: self.num_sharded], self.gradient[self.num_sharded :]
        return [(part, factor) for part, factor in ((rows, 1.0), (rest, share)) if part.numel()]

    @property
    @override
    def payload_bytes(self) -> int:
        """Bytes that one rank passes to the sums of one microbatch and to the all-reduce of a logical step."""
        whole = sum(self.parameters[name].numel() for name in self.sharded)
        return (whole + self.num_active - self.num_sharded + self.num_statistics) * self._dtype.itemsize

    def add_rows(self, view: Tensor, name: str, rows: Tensor) -> None:
        """Add this rank's rows of a sum over all ranks to the accumulator.

        Args:
            view: the parameter's entry in ``views``.
            name: name of the parameter.
            rows: sum over all ranks of this rank's rows, flat.
        """
        view.view(-1).add_(self.masks[name].select(rows) if name in self.masks else rows)
