"""Probe: collects gradients in the sandbox at the points where optimizers would step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_dp.step.step import PrivateStep


class Probe:
    """A probe that takes the gradients of a sandbox run at the points where a real run would step its optimizers.

    Args:
        step: the private step.
        engine: whether the per-sample engine records; else gradients of the whole batch are taken.
        read: takes something smaller than the gradients from the engine, given an optimizer's parameter names.
    """

    def __init__(self, step: PrivateStep, *, engine: bool, read: Callable[[list[str]], Any] | None = None) -> None:
        self._step, self._engine, self._read = step, engine, read
        self.found: list[Any] = []
        self.private: dict[str, Tensor] = {}
        self.public: dict[str, Tensor] = {}
        self.stepped: set[int] = set()
        self._raw: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Remove raw gradients as soon as autograd has made them, so that no line of user code sees one."""
        public = {name for index in self._step.settings.public_optimizers for name in self._step.parameters.of(index)}
        handles = [
            parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._step.module.named_parameters()
            if parameter.requires_grad and name not in public and not self._engine
        ]
        self._step.probe = self
        try:
            yield
        finally:
            self._step.probe = None
            for handle in handles:
                handle.remove()

    def _taker(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                self._raw[name] = self._raw[name] + gradient if name in self._raw else gradient

        return take

    def collect(self, optimizer: int) -> None:
        """Take the gradients of an optimizer, where a real run would step it."""
        step = self._step
        self.stepped.add(optimizer)
        names = list(step.parameters.of(optimizer))
        if optimizer in step.settings.public_optimizers:
            own = step.parameters.of(optimizer)
            self.public |= {n: p.grad.detach().clone() for n, p in own.items() if p.grad is not None}
        elif self._read is not None:
            self.found.append(self._read(names))
        elif self._engine:
            self.private |= step.reduction.per_sample_gradients(step.engine, names)
        else:
            self.private |= step.reduction.parts({name: self._raw[name] for name in names if name in self._raw})

    def discard(self, optimizer: int) -> None:
        """Forget gradients, as ``zero_grad`` does."""
        names = list(self._step.parameters.of(optimizer))
        if self._engine:
            self._step.engine.discard(names)
        for name in names:
            self._raw.pop(name, None)
