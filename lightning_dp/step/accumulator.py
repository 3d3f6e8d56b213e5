"""The buffer in which the clipped gradients of one private optimizer add up over a logical batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_dp.clipping import Clipping
from lightning_dp.masks import ParameterMask
from lightning_dp.noise import CorrelatedGaussianNoise, GaussianNoise
from lightning_dp.per_sample._torch import real_view
from lightning_dp.per_sample.targets import Places, Targets, places_of
from lightning_dp.system.local import as_gradient, local_part
from lightning_dp.system.torch_private import views_like


class Accumulator:
    """One flat buffer with a slice per parameter, so that noise, scaling and all-reduce are one operation each.

    It holds L coordinates of the gradient, behind them S statistics. Without a mask L is P, and the buffer of a step
    becomes that step's gradients once it is noised. Under a mask it holds active coordinates alone, in their order:
    inactive ones are never noised, never sent, and zero in every gradient. The next step begins in memory of its own.
    Without a mask, this buffer therefore needs no more memory than the gradients of non-private training, if those are
    freed before.

    A sum begins with zeros, or with the noise of its release (``begin_with_noise``). If it begins with noise, sum and
    noise may be stored already divided by the batch size.

    A complex entry is two real coordinates, each with its own noise.

    **Guarantee**: ``flat`` and ``scratch`` hold private sums. ``flat`` must not be released before noise is added to
    all of it; ``scratch`` is never released and is cleared before gradients are written there. No ``p.grad`` shares
    memory with ``flat`` before the release. After the release this object never writes that memory again, so a
    gradient that a user kept never shows a later sum, and neither hooks nor ``zero_grad`` reach one.

    Args:
        parameters: qualified name -> parameter, all on one device.
        clipping: how one sample's gradient is bounded at the start of the run.
        num_statistics: S.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], clipping: Clipping, num_statistics: int = 0) -> None:
        self.parameters = dict(parameters)
        self.names = list(self.parameters)
        self.groups = clipping.groups(self.parameters)
        first = next(iter(self.parameters.values()))
        parts = {name: real_view(local_part(parameter).detach()) for name, parameter in self.parameters.items()}
        double = any(part.dtype == torch.float64 for part in parts.values())
        self._shapes = {name: part.shape for name, part in parts.items()}
        self._like = [torch.empty(shape, device="meta") for shape in self._shapes.values()]
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self.num_coordinates = sum(self._sizes)
        self.num_statistics = num_statistics
        self._device = first.device
        self._dtype = torch.float64 if double else torch.float32
        self._flat: Tensor | None = None
        self._places: Places | None = None  # of the views, under the masks
        self._views: Targets | None = None  # of the buffer of this step; they go before its memory does
        self.used = False  # set it before anything is added
        self.noise_std: float | None = None  # of the noise that the gradient began with, in units of the sum
        self.divisor = 1  # every addition is divided by it
        self.base = clipping.for_coordinates(self.num_coordinates)
        self.clipping = self.base
        self.mask_version: tuple[Hashable, ...] = ()
        self.masks: dict[str, ParameterMask] = {}  # of the parameters with inactive coordinates
        self.active: Tensor | None = None  # booleans of shape (P,); None if all are
        self._active_indices: Tensor | None = None  # ascending, in the gradient
        self._scratch: Tensor | None = None  # under a mask, the memory of the gradients to come

    @property
    def flat(self) -> Tensor:
        """Buffer of this step, shape (L + S,); zeros at first, unless noise is drawn into it."""
        if self._flat is None:
            self._flat = self._new(self.num_active).zero_()
        return self._flat

    def _new(self, num: int) -> Tensor:
        """Return a buffer of arbitrary numbers for ``num`` coordinates and the statistics."""
        return torch.empty(num + self.num_statistics, dtype=self._dtype, device=self._device)

    def begin_with_noise(
        self,
        noise: GaussianNoise | CorrelatedGaussianNoise,
        std: float,
        divisor: int = 1,
        shares: Sequence[float] = (),
        share: float = 1.0,
    ) -> None:
        """Fill the buffer with the noise of its release before the first sample, which saves one pass over it.

        Args:
            noise: source of the noise.
            std: standard deviation on one coordinate of the sum, from public state only.
            divisor: if above 1, the gradient and its noise are stored divided by it, so that ``write_grads`` does not
                divide again.
            shares: factor of each group on the std; empty if all groups have the same std.
            share: factor of this process on the std of coordinates that every process holds.
        """
        self._flat, self._views = self._new(self.num_active), None
        if self.num_statistics:
            self.statistics.zero_()
        for part, factor in self.noise_parts(shares, share):
            noise.fill_(part, std * factor / divisor)
        self.used, self.noise_std, self.divisor = True, std, divisor

    def noise_parts(self, shares: Sequence[float], share: float = 1.0) -> list[tuple[Tensor, float]]:
        """Return slices of the gradient, each with its factor on the noise std.

        Args:
            shares: factor of each group; empty for one slice, of factor 1.
            share: a further factor, on coordinates that every process holds.
        """
        if not shares:
            return [(self.gradient, share)]
        factors = self.factors_by_name(shares)
        return [(view, factors[name] * share) for name, view in self.views.items() if view.numel()]

    def factors_by_name(self, shares: Sequence[float]) -> dict[str, float]:
        """Return the noise factor of each parameter's group, by parameter name."""
        return {name: share for group, share in zip(self.groups, shares, strict=True) for name in group}

    @property
    def group_sizes(self) -> list[int]:
        """Number of active coordinates in each group."""
        sizes = self._active_sizes
        return [sum(map(sizes.__getitem__, group)) for group in self.groups]

    @property
    def _active_sizes(self) -> dict[str, int]:
        sizes = dict(zip(self.names, self._sizes, strict=True))
        return sizes | {name: mask.num_active for name, mask in self.masks.items()}

    @property
    def gradient(self) -> Tensor:
        """Active coordinates of the gradient: the first L numbers of the buffer."""
        return self.flat[: self.num_active] if self.num_statistics else self.flat

    @property
    def statistics(self) -> Tensor:
        """Statistics of the clipping bound: the last S numbers of the buffer."""
        return self.flat[self.num_active :]

    @property
    def views(self) -> Targets:
        """Accumulation targets by parameter name: a view of its shape, or a 1-D view of its active coordinates if
        masked.
        """
        if self._places is None:
            masked = {name: torch.Size([mask.num_active]) for name, mask in self.masks.items()}
            self._places = places_of({**self._shapes, **masked})
        if self._views is None:
            self._views = Targets(self.gradient, self._places)
        return self._views

    @property
    def scratch(self) -> dict[str, Tensor]:
        """Full-size scratch buffers by parameter name, whose active entries are then selected; empty without a mask."""
        return {} if self.active is None else self.views_of(self._whole()[: self.num_coordinates])

    def _whole(self) -> Tensor:
        if self._scratch is None:
            self._scratch = self._new(self.num_coordinates)
        return self._scratch

    def views_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a buffer of shape (P,), one per parameter, by parameter name."""
        return dict(zip(self.names, views_like(flat, self._like), strict=True))

    def holds(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Tell whether this accumulator was made for exactly these parameters, on their current device."""
        return (
            len(parameters) == len(self.parameters)
            and all(self.parameters.get(name) is parameter for name, parameter in parameters.items())
            and next(iter(parameters.values())).device == self._device
        )

    def set_masks(self, masks: Sequence[Mapping[str, Tensor]], version: tuple[Hashable, ...]) -> None:
        """Activate the coordinates that are active in every mask; call it between two logical batches.

        Args:
            masks: parameter name -> boolean tensor of its shape, True where active; other parameters are all active.
            version: a key that differs between different masks.
        """
        self.mask_version = version
        self._forget()
        self._places = None
        active = torch.ones(self.num_coordinates, dtype=torch.bool, device=self._device)
        views = self.views_of(active)
        for mask in masks:
            for name in mask.keys() & views.keys():
                whole = mask[name].to(active.device)  # both numbers of a complex entry are active, or none
                views[name].logical_and_(whole[..., None] if self.parameters[name].is_complex() else whole)
        self.masks = {name: ParameterMask(view) for name, view in views.items() if not bool(view.all())}
        self.active = active if self.masks else None
        self._active_indices = active.nonzero().squeeze(1) if self.masks else None

    def _forget(self) -> None:
        self._flat = self._views = self._scratch = None
        self.used, self.noise_std, self.divisor = False, None, 1

    @property
    def sensitivity(self) -> float:
        """Largest norm that one sample can add to the sum under the current clipping."""
        return self.clipping.sensitivity(len(self.groups))

    @property
    def masks_of_norms(self) -> dict[str, ParameterMask]:
        """Masks for the norms of per-sample gradients, by parameter name."""
        return self.masks

    @property
    def num_active(self) -> int:
        """Number L of gradient coordinates that carry signal and noise."""
        return self.num_coordinates if self._active_indices is None else self._active_indices.numel()

    @property
    def payload_bytes(self) -> int:
        """Size of the buffer that one rank passes to the all-reduce of a logical step."""
        return (self.num_active + self.num_statistics) * self._dtype.itemsize

    def add(self, total: Tensor) -> None:
        """Add the active coordinates of a sum of contributions, shape (P,)."""
        self.gradient.add_(total if self.active is None else total[self.active])

    def add_at(self, positions: Tensor, values: Tensor) -> None:
        """Add values at positions of the gradient, indices below P; masked positions are left out."""
        if self._active_indices is not None:
            positions, present = self._among_active(positions)
            positions, values = positions[present], values[present]
        self.gradient.index_add_(0, positions, values)

    def reset(self) -> None:
        """Prepare the buffer for a new sum; write zeros only if something was added."""
        if self.used and self._flat is not None:
            self._flat.zero_()
        self.used, self.noise_std, self.divisor = False, None, 1

    def drop_grads(self) -> None:
        """Free the last step's gradients, as the optimizer's ``zero_grad`` would."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def read(self, noisy: Tensor, positions: Tensor) -> Tensor:
        """Return the values of active coordinates at positions of the gradient; masked positions give 0.

        Args:
            noisy: all active coordinates.
            positions: indices below P.
        """
        if self._active_indices is None:
            return noisy[positions]
        found, present = self._among_active(positions)
        return torch.where(present, noisy[found], 0.0)

    def _among_active(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Convert gradient positions to indices among active coordinates; also return which positions are active."""
        assert self._active_indices is not None
        found = torch.searchsorted(self._active_indices, positions).clamp(max=len(self._active_indices) - 1)
        return found, self._active_indices[found] == positions

    def clear_rows(self, rows: Mapping[str, int]) -> None:
        """Set rows of ``p.grad``, by name of the parameter, to zero after the noise: no sample has a signal there."""
        for name in rows.keys() & self.parameters.keys():
            if (gradient := self.parameters[name].grad) is not None:
                gradient[rows[name]] = 0.0

    def write_grads(self, noisy: Tensor, expected_batch_size: int, rescale: float = 1.0) -> None:
        """Set ``p.grad`` from the noisy sum, divided by the batch size and rescaled; masked coordinates get 0.

        Call it on noised sums only. The gradients are views of one buffer, or copies in the dtype of a parameter with
        another dtype. A sum that was stored divided is not divided again. Parameters without ``requires_grad`` get
        no gradient.

        Args:
            noisy: all active coordinates.
            expected_batch_size: divisor of the mean.
            rescale: a further factor.
        """
        if self.divisor == 1:
            self.clipping.finish(noisy, expected_batch_size, out=noisy)
        if rescale != 1.0:
            noisy.mul_(rescale)
        whole = self.flat
        if self._active_indices is not None:
            whole = self._whole().zero_()
            whole.index_copy_(0, self._active_indices, noisy)
        for name, gradient in self.views_of(whole[: self.num_coordinates]).items():
            parameter = self.parameters[name]
            if parameter.is_complex():
                gradient = torch.view_as_complex(gradient.clone())
            if gradient.dtype != parameter.dtype:
                gradient = gradient.to(parameter.dtype)
            parameter.grad = as_gradient(gradient, parameter) if parameter.requires_grad else None
        self._forget()
