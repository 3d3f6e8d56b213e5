"""The buffer in which the clipped gradients of one private optimizer add up over a logical batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_dp.clipping import Clipping


class ClippedSum:
    """One flat buffer with a view a parameter: noise, scaling and the all-reduce are one call each.

    **Guarantee**: ``flat`` holds private, un-noised sums until ``lightning_dp.noise`` has been added; it never aliases a
    ``p.grad``, so neither a user's hook nor ``zero_grad`` can reach it.

    Args:
        parameters: qualified name -> parameter, all on one device.
        clipping: decides the groups whose norms are bounded.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], clipping: Clipping) -> None:
        self.parameters = dict(parameters)
        self.names = list(self.parameters)
        self.groups = clipping.groups(self.parameters)
        first = next(iter(self.parameters.values()))
        double = any(parameter.dtype == torch.float64 for parameter in self.parameters.values())
        self._sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.flat = torch.zeros(sum(self._sizes), dtype=torch.float64 if double else torch.float32, device=first.device)
        self.views = self._views_of(self.flat)
        self.used = False  # set it before anything is added
        self._released = torch.zeros_like(self.flat)
        self._gradients = self._views_of(self._released)

    def _views_of(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, self._sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def holds(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether this buffer was made for exactly these parameters, where they are now."""
        return (
            len(parameters) == len(self.parameters)
            and all(self.parameters.get(name) is parameter for name, parameter in parameters.items())
            and next(iter(parameters.values())).device == self.flat.device
        )

    def reset(self) -> None:
        """Forgets whatever has been added; costs nothing where nothing has."""
        if self.used:
            self.flat.zero_()
            self.used = False

    def drop_grads(self) -> None:
        """Frees the last step's gradients, as the optimizer's ``zero_grad`` would."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def write_grads(self, expected_batch_size: int) -> None:
        """``p.grad = flat / expected_batch_size``; the buffer is empty afterwards. Call it on noised sums only.

        The gradients are views of one buffer, written anew at every step: clone what must outlive the step.
        """
        torch.mul(self.flat, 1 / expected_batch_size, out=self._released)
        for name, gradient in self._gradients.items():
            parameter = self.parameters[name]
            parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
        self.reset()
