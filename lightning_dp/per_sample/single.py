"""Per-sample gradients of one sample at a time, by plain autograd, for any module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import real_view
from lightning_dp.per_sample.base import GradientEngine
from lightning_dp.per_sample.joining import Joining
from lightning_dp.per_sample.rules.base import widen
from lightning_dp.per_sample.single_gradients import SingleGradients, most_kept

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
        self._released = set[str]()  # names of parameters whose ``.grad`` is private in this microbatch
        self._size = 1
        self._sample: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}
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
        self._parameters, self._most_kept = dict(parameters), most_kept(parameters.values())
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
            grad = self._taken_from(parameter)
            if grad is not None:
                self._sample[name] = self._sample[name] + grad if name in self._sample else grad

        return collect

    def _taken_from(self, parameter: Tensor) -> Tensor | None:
        """Take the contents of ``.grad``; return them, if there are any to record."""
        grad = parameter.grad
        if grad is None or not self._active:
            return None
        parameter.grad = None
        if not self.listening:
            return None
        grad = real_view(grad)
        if grad.layout != torch.strided or grad.requires_grad or grad.dtype not in _WIDE:
            grad = widen((grad if grad.layout == torch.strided else grad.to_dense()).detach())
        return grad

    @override
    def take_written(self, names: Iterable[str]) -> None:
        for name in names:
            grad = None if name in self._released else self._taken_from(self._parameters[name])
            if grad is not None:  # in place of what a backward has made
                self._sample[name] = grad

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
        self._active, self._released = True, set()

    @override
    def discard(self, names: Iterable[str] | None = None) -> None:
        for name in list(self._parameters) if names is None else names:
            self._sample.pop(name, None)
            self._before.pop(name, None)
            self._released.discard(name)

    @override
    def has_backprops(self, names: Iterable[str]) -> bool:
        return any(name in self._sample for name in names)

    @property
    @override
    def most_kept(self) -> int:
        return self._most_kept if self._size else 0

    @override
    def take(self) -> dict[str, Tensor]:
        taken, self._sample = self._sample, {}
        for name, grad in taken.items() if self._most_kept > 1 else ():
            if grad.untyped_storage().nbytes() > 2 * grad.nbytes:  # it would keep much more than itself
                taken[name] = grad.clone()
        return taken

    @override
    def taken(self, samples: Sequence[Mapping[str, Tensor]]) -> SingleGradients:
        return SingleGradients(self._parameters, samples)

    @override
    def accept_grads(self, names: Iterable[str]) -> None:
        """Keep the present ``.grad`` of these parameters when the microbatch ends."""
        for name in names:
            self._before.pop(name, None)
            self._released.add(name)

    @override
    def check_tracked(self) -> None:
        pass  # every use of a parameter is seen

    @override
    def end(self) -> None:
        """Free the gradients; restore the contents of ``.grad`` from before :meth:`begin`."""
        self._active = False
        self._sample = {}
        for name, grad in self._before.items():
            self._parameters[name].grad = grad
        self._before = {}

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        return self._present.squared_norms(groups, masks)

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._present.accumulate(factors, groups, out, masks, scratch)

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        return self._present.per_sample_gradients(names)

    @property
    def _present(self) -> SingleGradients:
        """The gradients of this microbatch: of one sample, or of none in an empty microbatch."""
        return SingleGradients(self._parameters, [self._sample] if self._size else [])
