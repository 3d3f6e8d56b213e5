"""The buffer in which the clipped gradients of one private optimizer add up over a logical batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_dp.clipping import Clipping


class ClippedSum:
    """One flat buffer with a view a parameter: noise, scaling and the all-reduce are one call each.

    Behind the P coordinates of the gradient lie S statistics. Under a mask only live coordinates and statistics are
    handed out by ``payload``: what is masked is never noised, never sent and zero in every gradient.

    **Guarantee**: ``flat`` holds private, un-noised sums until ``lightning_dp.noise`` has been added; it never aliases a
    ``p.grad``, so neither a user's hook nor ``zero_grad`` can reach it.

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
        self.flat = torch.zeros(self.num_coordinates + num_statistics, dtype=dtype, device=first.device)
        self.gradient, self.statistics = torch.split(self.flat, [self.num_coordinates, num_statistics])
        self.views = self.views_of(self.gradient)
        self.used = False  # set it before anything is added
        self.base = clipping.for_coordinates(self.num_coordinates)
        self.clipping = self.base
        self.mask_version: tuple[Hashable, ...] = ()
        self.mask: dict[str, Tensor] | None = None
        self.live: Tensor | None = None
        self._packed = self.flat
        self._places: Tensor | None = None
        self._released = torch.zeros_like(self.gradient)
        self._gradients = self.views_of(self._released)

    def views_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns a view a parameter on a buffer of shape (P,)."""
        parts = torch.split(flat, self._sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def holds(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this buffer was made for exactly these parameters, where they are now."""
        return (
            len(parameters) == len(self.parameters)
            and all(self.parameters.get(name) is parameter for name, parameter in parameters.items())
            and next(iter(parameters.values())).device == self.flat.device
        )

    def set_masks(self, masks: Sequence[Mapping[str, Tensor]], version: tuple[Hashable, ...]) -> None:
        """Says which coordinates are live from here on, between two logical batches: those that every mask keeps.

        Args:
            masks: parameter name -> boolean tensor of its shape, True where live; what is not named is live.
            version: of these masks.
        """
        self.mask_version = version
        self._released.zero_()
        whole = torch.ones_like(self.flat, dtype=torch.bool)
        views = self.views_of(whole[: self.num_coordinates])
        for mask in masks:
            for name in mask.keys() & views.keys():
                views[name].logical_and_(mask[name].to(whole.device))
        if bool(whole.all()):
            self.mask = self.live = self._places = None
            self._packed = self.flat
            return
        self.mask, self.live = views, whole[: self.num_coordinates]
        self._places = whole.nonzero().squeeze(1)
        self._packed = self.flat.new_empty(len(self._places))

    @property
    def sensitivity(self) -> float:
        """The largest norm that one sample adds under the clipping in force."""
        return self.clipping.sensitivity(len(self.groups))

    @property
    def num_live(self) -> int:
        """Coordinates of the gradient that carry signal and noise."""
        return self._packed.numel() - self.statistics.numel()

    @property
    def payload_bytes(self) -> int:
        """Size of what one rank hands to the all-reduce of a logical step."""
        return self._packed.numel() * self._packed.element_size()

    def add(self, contribution: Tensor) -> None:
        """Adds the sum of what the samples of a microbatch contribute: shape (P,)."""
        self.gradient += contribution

    def reset(self) -> None:
        """Forgets whatever has been added; costs nothing where nothing has."""
        if self.used:
            self.flat.zero_()
            self.used = False

    def drop_grads(self) -> None:
        """Frees the last step's gradients, as the optimizer's ``zero_grad`` would."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def payload(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is released, in one buffer: all of it, the live coordinates, and the statistics (two views)."""
        if self._places is not None:
            torch.index_select(self.flat, 0, self._places, out=self._packed)
        gradient, statistics = torch.split(self._packed, [self.num_live, self.statistics.numel()])
        return self._packed, gradient, statistics

    def write_grads(self, noisy: Tensor, expected_batch_size: int, rescale: float = 1.0) -> None:
        """``p.grad = finish(noisy) rescale``, 0 where masked; the buffer is empty afterwards. Call it on noised sums only.

        The gradients are views of one buffer, written anew at every step: clone what must outlive the step.

        Args:
            noisy: the live coordinates of the payload.
            expected_batch_size: what the mean is taken over.
            rescale: a further factor.
        """
        if self._places is None:
            self.clipping.finish(noisy, expected_batch_size, out=self._released)
        else:
            self.clipping.finish(noisy, expected_batch_size, out=noisy)
            self._released.index_copy_(0, self._places[: self.num_live], noisy)
        if rescale != 1.0:
            self._released.mul_(rescale)
        for name, gradient in self._gradients.items():
            parameter = self.parameters[name]
            parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
        self.reset()
