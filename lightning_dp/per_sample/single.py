"""Per-sample gradients of one sample at a time, by plain autograd, for any module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import add_scaled, norms_of
from lightning_dp.per_sample.base import GradientEngine
from lightning_dp.per_sample.combining import zero_gradient
from lightning_dp.per_sample.joining import Joining
from lightning_dp.per_sample.kept_samples import KeptSamples, most_kept
from lightning_dp.per_sample.rules.base import LONGEST_SUM, norms_of_blocks, widen

_WIDE = (torch.float32, torch.float64)


class SingleSampleEngine(GradientEngine):
    """The engine for microbatches of one sample: the gradient of the loss IS the sample's gradient.

    **Guarantee**: between :meth:`begin` and :meth:`end` a raw gradient is removed from ``.grad`` as soon as autograd
    has added it, so no user hook that runs after the backward sees it. Private parameters may be used in any way.

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

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        self._attached = False
        self._active = False
        self._size = 1
        self._grads: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}
        self._kept: KeptSamples | None = None
        self._most_kept = 0
        self.listening = True

    @override
    def attach(self) -> None:
        self._attached = True
        if not self._handles:
            self._handles = [
                parameter.register_post_accumulate_grad_hook(self._collector(name))  # type: ignore[no-untyped-call]
                for name, parameter in self._parameters.items()
                if parameter.requires_grad
            ]

    @override
    def detach(self) -> None:
        self.end()
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @override
    def set_parameters(self, parameters: Mapping[str, nn.Parameter], gathered: Collection[str] = ()) -> None:
        if self._parameters.keys() == parameters.keys() and all(
            self._parameters[name] is parameter for name, parameter in parameters.items()
        ):
            return
        attached = self._attached
        self.detach()
        self._parameters, self._kept, self._most_kept = dict(parameters), None, most_kept(parameters.values())
        if attached:
            self.attach()

    @property
    @override
    def has_layout(self) -> bool:
        return True

    @override
    def learn_layout(
        self,
        run: Callable[[int], object],
        sizes: tuple[int, int] = (2, 5),
        *,
        more: bool = False,
        alike: bool = False,
    ) -> None:
        pass  # a microbatch of one sample needs no batch axis

    @override
    def see(self, batch: Any) -> None:
        pass  # everything belongs to the one sample

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            if not self._active:
                return
            grad = parameter.grad
            if grad is None:
                return
            parameter.grad = None
            if not self.listening:
                return
            if grad.layout != torch.strided or grad.requires_grad or grad.dtype not in _WIDE:
                grad = widen((grad if grad.layout == torch.strided else grad.to_dense()).detach())
            self._grads[name] = self._grads[name] + grad if name in self._grads else grad

        return collect

    @override
    def begin(self, batch_size: int, owners: Tensor | None = None) -> None:
        """Start a microbatch of at most one sample. The contents of ``.grad`` are set aside until :meth:`end`."""
        if owners is not None:
            batch_size = Joining(owners).num
        if batch_size not in (0, 1):
            raise ValueError(
                f"Expected at most one sample in a microbatch, got batch_size={batch_size}. Use microbatch_size=1."
            )
        self.end()
        self._size = batch_size
        self._before = {name: parameter.grad for name, parameter in self._parameters.items()}
        for name, grad in self._before.items():
            if grad is not None:
                self._parameters[name].grad = None
        self._active = True

    @override
    def discard(self, names: Iterable[str] | None = None) -> None:
        for name in list(self._parameters) if names is None else names:
            self._grads.pop(name, None)
            self._before.pop(name, None)

    @override
    def has_backprops(self, names: Iterable[str]) -> bool:
        return any(name in self._grads for name in names)

    @property
    @override
    def most_kept(self) -> int:
        return self._most_kept if self._size else 0

    @override
    def keep(self, position: int) -> None:
        if self._kept is None:
            self._kept = KeptSamples(self._parameters)
        self._kept.write(position, self._grads)
        self._grads = {}

    @override
    def kept(self, num: int) -> KeptSamples:
        assert self._kept is not None
        self._kept.num = num
        return self._kept

    @override
    def accept_grads(self, names: Iterable[str]) -> None:
        """Keep the present ``.grad`` of these parameters when the microbatch ends."""
        for name in names:
            self._before.pop(name, None)

    @override
    def check_tracked(self) -> None:
        pass  # every use of a parameter is seen

    @override
    def end(self) -> None:
        """Free the gradients; restore the contents of ``.grad`` from before :meth:`begin`."""
        self._active = False
        self._grads = {}
        for name, grad in self._before.items():
            self._parameters[name].grad = grad
        self._before = {}

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        with self._arithmetic():
            norms = self._new_norms(len(groups), self._size)
            for row, group in zip(norms, groups, strict=True):
                parts = self._received(group, masks or {})
                if parts:
                    row += _sum_of_squares([*parts.values()], row.dtype)
            return norms

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        with self._arithmetic():
            for row, group in zip(factors, groups, strict=True):
                parts = self._received(group, masks or {})
                if not parts:
                    continue
                if row.device.type == "cpu":
                    if factor := float(row[0]):
                        add_scaled([out[name] for name in parts], [*parts.values()], factor)
                    continue
                for name, active in parts.items():  # without waiting for the device
                    out[name].add_(torch.where(row[0] == 0, 0.0, active * row[0].to(active.dtype)))

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        asked = list(self._parameters if names is None else names)
        grads = {name: zero_gradient(self._parameters[name], self._size) for name in asked}
        return {**grads, **{name: grad.unsqueeze(0) for name, grad in self._received(asked, {}).items()}}

    def _received(self, names: Iterable[str], masks: Mapping[str, ParameterMask]) -> dict[str, Tensor]:
        """Return the (masked) gradients of these parameters: nothing in an empty microbatch, or where no backward has
        reached.
        """
        grads = self._grads if self._size else {}
        return {
            name: masks[name].select(grads[name]) if name in masks else grads[name] for name in names if name in grads
        }

    @override
    def _arithmetic(self) -> AbstractContextManager[None]:
        # sums of squares and of products with a number have no shortened form; autocast may still change their types
        kind = next((parameter.device.type for parameter in self._parameters.values()), "cpu")
        if torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
            return super()._arithmetic()
        return nullcontext()


def _sum_of_squares(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the sum of all squares, in float64 where the device has it; all small tensors take one call, because
    their overhead is most of what a small model costs.
    """
    small = [tensor for tensor in tensors if tensor.numel() <= LONGEST_SUM]
    found = [norms_of_blocks(tensor, 1).view(-1) for tensor in tensors if tensor.numel() > LONGEST_SUM]
    if small:
        found.append(torch.stack([norm if norm.dtype == dtype else norm.to(dtype) for norm in norms_of(small)]))
    norms = torch.cat([each.to(dtype) for each in found])
    return norms.square_().sum(dtype=None if norms.device.type == "mps" else torch.float64)
