"""The buffer in which the clipped gradients of one private optimizer add up over a logical batch."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_dp.clipping import Clipping
from lightning_dp.noise import GaussianNoise


class ClippedSum:
    """One flat buffer with a view a parameter: noise, scaling and the all-reduce are one call each.

    The buffer of a step becomes that step's gradients once it is noised. The next step takes it back if by then nobody
    holds one of these gradients, and a fresh one otherwise: no more memory is held than without privacy.

    It begins with the noise of its release (``begin_with_noise``), then maybe as a mean from the start, or with zeros.

    Behind the P coordinates of the gradient lie S statistics. Under a mask only live coordinates and statistics are
    handed out by ``payload``: what is masked is never noised, never sent and zero in every gradient.

    **Guarantee**: ``flat`` holds private sums, not to be released before ``lightning_dp.noise`` is in all of them; no
    ``p.grad`` aliases it before, and after it was handed out it is written again only when this object is its last owner, so a
    gradient that a user kept never shows a later sum, and neither a hook nor ``zero_grad`` can reach one.

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
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        self._sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.num_coordinates = sum(self._sizes)
        dtype = torch.float64 if double else torch.float32
        self.num_statistics = num_statistics
        self._new = partial(torch.empty, self.num_coordinates + num_statistics, dtype=dtype, device=first.device)
        self._device = first.device
        self._dtype = dtype
        self._flat: Tensor | None = None
        self._handed_out: Tensor | None = None
        self._takes_back = not is_shared(torch.empty(1, device=first.device))
        self.used = False  # set it before anything is added
        self.noise_std: float | None = None  # of the noise that the gradient began with, in units of the sum
        self.divisor = 1  # what is added is divided by it
        self.base = clipping.for_coordinates(self.num_coordinates)
        self.clipping = self.base
        self.mask_version: tuple[Hashable, ...] = ()
        self.mask: dict[str, Tensor] | None = None
        self.live: Tensor | None = None
        self._packed: Tensor | None = None
        self._places: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """The buffer of this step, shape (P + S,); zeros where nothing was added yet."""
        if self._flat is None:
            self._flat = self._fresh().zero_()
        return self._flat

    def _fresh(self) -> Tensor:
        """Returns the last step's buffer if nobody else has it, else a new one; with arbitrary values."""
        held, self._handed_out = self._handed_out, None
        return self._new() if held is None or is_shared(held) else held

    def begin_with_noise(self, noise: GaussianNoise, std: float, divisor: int = 1) -> None:
        """Begins a sum with the noise of its release: the buffer is passed over once less than when it is added at the end.

        Args:
            noise: where it comes from.
            std: of a coordinate of the sum, from public state only.
            divisor: above 1, the gradient is held divided by it, noise included, and nothing is left to divide: once less again.
        """
        self._flat = self._fresh()
        self._flat[self.num_coordinates :].zero_()
        noise.fill_(self._flat[: self.num_coordinates], std / divisor)
        self.used, self.noise_std, self.divisor = True, std, divisor

    @property
    def gradient(self) -> Tensor:
        """The first P numbers of the buffer."""
        return self.flat[: self.num_coordinates]

    @property
    def statistics(self) -> Tensor:
        """The last S numbers of the buffer."""
        return self.flat[self.num_coordinates :]

    @property
    def views(self) -> dict[str, Tensor]:
        """A view a parameter on the buffer."""
        return self.views_of(self.gradient)

    def views_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns a view a parameter on a buffer of shape (P,)."""
        parts = torch.split(flat, self._sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def holds(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this buffer was made for exactly these parameters, where they are now."""
        return (
            len(parameters) == len(self.parameters)
            and all(self.parameters.get(name) is parameter for name, parameter in parameters.items())
            and next(iter(parameters.values())).device == self._device
        )

    def set_masks(self, masks: Sequence[Mapping[str, Tensor]], version: tuple[Hashable, ...]) -> None:
        """Says which coordinates are live from here on, between two logical batches: those that every mask keeps.

        Args:
            masks: parameter name -> boolean tensor of its shape, True where live; what is not named is live.
            version: of these masks.
        """
        self.mask_version = version
        whole = torch.ones(self.num_coordinates + self.num_statistics, dtype=torch.bool, device=self._device)
        views = self.views_of(whole[: self.num_coordinates])
        for mask in masks:
            for name in mask.keys() & views.keys():
                views[name].logical_and_(mask[name].to(whole.device))
        if bool(whole.all()):
            self.mask = self.live = self._places = self._packed = None
            return
        self.mask, self.live = views, whole[: self.num_coordinates]
        self._places = whole.nonzero().squeeze(1)
        self._packed = torch.empty(len(self._places), dtype=self._dtype, device=self._device)

    @property
    def sensitivity(self) -> float:
        """The largest norm that one sample adds under the clipping in force."""
        return self.clipping.sensitivity(len(self.groups))

    @property
    def num_live(self) -> int:
        """Coordinates of the gradient that carry signal and noise."""
        held = self.num_coordinates + self.num_statistics if self._places is None else self._places.numel()
        return held - self.num_statistics

    @property
    def payload_bytes(self) -> int:
        """Size of what one rank hands to the all-reduce of a logical step."""
        return (self.num_live + self.num_statistics) * self._dtype.itemsize

    def add(self, contribution: Tensor) -> None:
        """Adds the sum of what the samples of a microbatch contribute: shape (P,)."""
        self.gradient.add_(contribution)

    def reset(self) -> None:
        """Forgets whatever has been added; costs nothing where nothing has."""
        if self.used and self._flat is not None:
            self._flat.zero_()
        self.used, self.noise_std, self.divisor = False, None, 1

    def drop_grads(self) -> None:
        """Frees the last step's gradients, as the optimizer's ``zero_grad`` would."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def payload(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is released, in one buffer: all of it, the live coordinates, and the statistics (two views)."""
        if self._places is None:
            packed = self.flat
        else:
            assert self._packed is not None
            packed = torch.take(self.flat, self._places, out=self._packed)
        gradient, statistics = torch.split(packed, [self.num_live, self.num_statistics])
        return packed, gradient, statistics

    def read(self, noisy: Tensor, positions: Tensor) -> Tensor:
        """Returns what the live coordinates of a payload hold at positions of the gradient, 0 where masked.

        Args:
            noisy: the live coordinates of the payload.
            positions: indices below P.
        """
        if self._places is None:
            return noisy[positions]
        places = self._places[: self.num_live]
        found = torch.searchsorted(places, positions).clamp(max=len(places) - 1)
        return torch.where(places[found] == positions, noisy[found], 0.0)

    def write_grads(self, noisy: Tensor, expected_batch_size: int, rescale: float = 1.0) -> None:
        """``p.grad = finish(noisy) rescale``, 0 where masked, or ``noisy`` where it is the mean. Call it on noised sums only.

        The gradients are views of the buffer, which is theirs from here on.

        Args:
            noisy: the live coordinates of the payload.
            expected_batch_size: what the mean is taken over.
            rescale: a further factor.
        """
        if self.divisor == 1:
            self.clipping.finish(noisy, expected_batch_size, out=noisy)
        if rescale != 1.0:
            noisy.mul_(rescale)
        if self._places is not None:
            self.flat.zero_()  # what is masked was summed up without noise
            self.flat.index_copy_(0, self._places[: self.num_live], noisy)
        for name, gradient in self.views.items():
            parameter = self.parameters[name]
            parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
        self._handed_out = self._flat if self._takes_back else None
        self._flat, self.used, self.noise_std, self.divisor = None, False, None, 1


def _owners(tensor: Tensor) -> tuple[int, int]:
    """How often the memory of a tensor is referred to, by tensors and by Python; (0, 0) where torch does not tell."""
    count, storage = getattr(torch._C, "_storage_Use_Count", None), tensor.untyped_storage()
    return (0, 0) if count is None else (count(storage._cdata), sys.getrefcount(storage))


_ALONE = _owners(torch.zeros(1))


def is_shared(tensor: Tensor) -> bool:
    """Whether the memory of a tensor has a second owner: a view, a gradient, an array.

    True where torch does not tell, and on devices that work behind the program's back: what is let go of may still be read.
    """
    tensors, names = _owners(tensor)
    return tensor.device.type != "cpu" or tensors == 0 or tensors > _ALONE[0] or names > _ALONE[1]
