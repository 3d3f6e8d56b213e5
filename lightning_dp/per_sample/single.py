"""One sample at a time: plain autograd, for any module at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample.engine import add_masked, boolean_masks
from lightning_dp.per_sample.precision import exact_arithmetic
from lightning_dp.per_sample.rules.base import squared_norm, widen
from lightning_dp.per_sample.sources import zero_gradient


class SingleSampleEngine:
    """The per-sample engine for microbatches of one sample: the gradient of the loss IS the sample's gradient.

    **Guarantee**: between :meth:`begin` and :meth:`end` a raw gradient leaves ``.grad`` in the moment autograd has
    added it; no hook of a user's that runs after the backward sees it. Private parameters may be used in any way.

    Args:
        module: the user's module.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> engine = SingleSampleEngine(layer)
        >>> engine.attach()
        >>> engine.set_parameters(dict(layer.named_parameters()))
        >>> engine.begin(1)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> layer.weight.grad is None, engine.squared_norms([["weight"]])
        (True, tensor([[4.]]))
        >>> engine.end()
    """

    has_layout = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._attached = False
        self._active = False
        self._size = 1
        self._grads: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}
        self.listening = True

    def attach(self) -> None:
        """Register the hooks on the private parameters; a second call changes nothing."""
        self._attached = True
        if not self._handles:
            self._handles = [
                parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
                for name, parameter in self._parameters.items()
                if parameter.requires_grad
            ]

    def detach(self) -> None:
        """Remove the hooks; a second call changes nothing."""
        self.end()
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Say which parameters are private: qualified name to parameter."""
        if self._parameters.keys() == parameters.keys() and all(
            self._parameters[name] is parameter for name, parameter in parameters.items()
        ):
            return
        attached = self._attached
        self.detach()
        self._parameters = dict(parameters)
        if attached:
            self.attach()

    def learn_layout(self, run: Callable[[int], None], sizes: tuple[int, int] = (2, 5), *, more: bool = False) -> None:
        """Do nothing: a microbatch of one sample needs no batch axis."""

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            if not self._active or parameter.grad is None:
                return
            grad, parameter.grad = parameter.grad, None
            if not self.listening:
                return
            if grad.is_sparse:
                grad = grad.to_dense()
            grad = widen(grad.detach())
            self._grads[name] = self._grads[name] + grad if name in self._grads else grad

        return collect

    def begin(self, batch_size: int) -> None:
        """Start a microbatch of one sample (or none). What ``.grad`` held is put aside until :meth:`end`."""
        if batch_size not in (0, 1):
            raise ValueError(f"Expected at most one sample in a microbatch, got batch_size={batch_size}.")
        self.end()
        self._size = batch_size
        self._before = {name: parameter.grad for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None
        self._active = True

    def discard(self, names: Iterable[str] | None = None) -> None:
        """Forget the gradients received so far for these parameters (None: all), as ``zero_grad`` does."""
        for name in list(self._parameters) if names is None else names:
            self._grads.pop(name, None)
            self._before.pop(name, None)

    def has_backprops(self, names: Iterable[str]) -> bool:
        """Tell whether a gradient is waiting for any of these parameters."""
        return any(name in self._grads for name in names)

    def accept_grads(self, names: Iterable[str]) -> None:
        """Leave these parameters the ``.grad`` that they were given within a microbatch."""
        for name in names:
            self._before.pop(name, None)

    def check_tracked(self) -> None:
        """Do nothing: every use of a parameter is seen."""

    def end(self) -> None:
        """Free the gradients; put back what ``.grad`` held before :meth:`begin`."""
        self._active = False
        self._grads = {}
        for name, grad in self._before.items():
            self._parameters[name].grad = grad
        self._before = {}

    def squared_norms(self, groups: Sequence[Sequence[str]], mask: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the squared norms, shape ``(G, 1)``, as :meth:`PerSampleEngine.squared_norms` does."""
        masks = boolean_masks(mask)
        with self._arithmetic():
            parameters = list(self._parameters.values())
            wide = any(p.dtype == torch.float64 for p in parameters)
            device = parameters[0].device if parameters else None
            norms = torch.zeros(len(groups), self._size, dtype=torch.float64 if wide else torch.float32, device=device)
            for row, group in enumerate(groups):
                for name in group:
                    if name in self._grads and self._size:
                        grad = self._grads[name]
                        norms[row] += squared_norm((grad * masks[name] if name in masks else grad).unsqueeze(0))
            return norms

    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        places: Mapping[str, Tensor] | None = None,
        room: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add ``factors[g, 0] * gradient`` to ``out[name]`` as :meth:`PerSampleEngine.accumulate` does."""
        masks, places = boolean_masks(mask), places or {}
        if not self._size:
            return
        with self._arithmetic():
            for row, group in enumerate(groups):
                factor = factors[row, 0]
                for name in group:
                    if name in self._grads:
                        grad = self._grads[name]
                        scaled = torch.where(factor == 0, grad.new_zeros(()), grad * factor.to(grad.dtype))
                        add_masked(out[name], scaled, masks.get(name), places.get(name))

    def per_sample_gradients(
        self, names: Iterable[str] | None = None, mask: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the gradient, shape ``(1, *shape)`` a parameter; zeros where none came."""
        masks = boolean_masks(mask)
        grads: dict[str, Tensor] = {}
        for name in self._parameters if names is None else names:
            if name in self._grads and self._size:
                grad = self._grads[name].unsqueeze(0)
                grads[name] = grad * masks[name] if name in masks else grad
            else:
                grads[name] = zero_gradient(self._parameters[name], self._size)
        return grads

    def _arithmetic(self) -> AbstractContextManager[None]:
        return exact_arithmetic(next((p.device.type for p in self._parameters.values()), "cpu"))
