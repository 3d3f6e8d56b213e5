"""Probe: collects the gradients of a sandbox run at the points where optimizers would step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample._torch import real_view
from lightning_dp.step.step import PrivateStep
from lightning_dp.system.torch_private import without_hooks
from lightning_dp.trials.foreign import note

_NO_GRADIENT = (
    "After a backward, p.grad of private parameters is None until their optimizer steps, because raw gradients are not "
    "private: on_before_optimizer_step finds the private ones."
)


class Probe:
    """A probe that takes the gradients of a sandbox run at the points where a real run would step its optimizers.

    Args:
        step: the private step.
        engine: whether the per-sample engine records; else gradients of the whole batch are taken.
        read: reads a summary instead of the gradients from the engine, given an optimizer's parameter names.
        rehearses: whether private optimizers step, each on a gradient that is the same whatever the records are.
    """

    def __init__(
        self,
        step: PrivateStep,
        *,
        engine: bool,
        read: Callable[[list[str]], Any] | None = None,
        rehearses: bool = False,
    ) -> None:
        self._step, self._engine, self._read, self.rehearses = step, engine, read, rehearses
        self.found: list[Any] = []
        self.private: dict[str, Tensor] = {}
        self.public: dict[str, Tensor] = {}
        self.stepped: list[int] = []
        self.used = set[str]()  # names of private parameters that got a gradient; none if the engine records
        self.drawn: Any = None  # states of the global generators after the forward
        self.seeds: dict[str, Any] = {}  # of the global generators, then
        self._raw: dict[str, Tensor] = {}
        self._handles: dict[str, Any] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach this probe within the context; keep raw private gradients out of ``p.grad`` and from hooks on
        parameters, so that user code sees none.
        """
        private = {} if self._engine else self._private()
        self._step.probe = self
        with without_hooks(private.values()):
            self._take_from(private)
            try:
                yield
            except Exception as error:
                if self._raw and not self._step.automatic:
                    note(error, _NO_GRADIENT)
                raise
            finally:
                self._step.probe = None
                for handle in self._handles.values():
                    handle.remove()
                for parameter in self._step.module.parameters() if self.rehearses else ():
                    parameter.grad = None

    def _private(self) -> dict[str, nn.Parameter]:
        public = {name for index in self._step.settings.public_optimizers for name in self._step.parameters.of(index)}
        named = self._step.module.named_parameters()
        own = {name for accumulator in self._step.accumulators.values() for name in accumulator.parameters}
        return {name: one for name, one in named if (one.requires_grad or name in own) and name not in public}

    def _take_from(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name in parameters.keys() - self._handles.keys():
            parameter, trains = parameters[name], parameters[name].requires_grad
            parameter.requires_grad_(True)  # torch takes no hook else, and the step may thaw it
            take = parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]
            self._handles[name] = take
            parameter.requires_grad_(trains)

    def take_thawed(self) -> None:
        """Take the gradients of parameters, too, that a hook of this run has thawed before the step."""
        self._take_from(self._private())

    def _taker(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self.used.add(name)
                gradient = real_view(gradient.detach().to_dense() if gradient.is_sparse else gradient.detach())
                self._raw[name] = self._raw[name] + gradient if name in self._raw else gradient

        return take

    def collect(self, optimizer: int) -> None:
        """Take the gradients of an optimizer at the point where a real run would step it."""
        step = self._step
        own = step.parameters.of(optimizer)
        for name in self._handles.keys() & own.keys() if optimizer not in self.stepped else ():
            if own[name].grad is not None:  # user code has written it by itself
                self._raw.pop(name, None)
                self._taker(name)(own[name])
        self.stepped.append(optimizer)
        names = list(own)
        if optimizer in step.settings.public_optimizers:
            self.public |= {n: p.grad.detach().clone() for n, p in own.items() if p.grad is not None}
        elif self._read is not None:
            self.found.append(self._read(names))
        elif self._engine:
            self.private |= step.reduction.per_sample_gradients(step.engine, names)
        else:
            self.private |= step.reduction.parts({name: self._raw[name] for name in names if name in self._raw})
        if self.rehearses:
            self._give(optimizer)

    def keep_raw(self, optimizer: int) -> None:
        """Take the gradients of an optimizer that the user's code did not step."""
        if optimizer not in self.stepped:
            self.private |= self._step.reduction.parts(self._raw)

    def _give(self, optimizer: int) -> None:
        """Give a private optimizer a gradient twice as long as a released one, the same whatever the records are."""
        step = self._step
        if optimizer not in step.accumulators:
            return
        step.check_grads(optimizer)
        parameters, release = step.accumulators[optimizer].parameters.values(), step.releases.get(optimizer)
        length = step.accumulators[optimizer].sensitivity if release is None else release.sensitivity
        noise = 0.0 if release is None else release.noise_std / step.plan.expected_batch_size
        size = noise + length / math.sqrt(sum(parameter.numel() for parameter in parameters))
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 2 * size if math.isfinite(size) else 1.0)

    def discard(self, optimizer: int) -> None:
        """Forget the gradients of an optimizer, as its ``zero_grad`` does."""
        names = list(self._step.parameters.of(optimizer))
        if self._engine:
            self._step.engine.discard(names)
        for name in names:
            self._raw.pop(name, None)
