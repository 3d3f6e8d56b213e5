"""Sandbox: the one way to run user code without effect, and the guard over optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_dp._messages import without_warnings
from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import uncompiled
from lightning_dp.sandbox.held_functions import content_of
from lightning_dp.sandbox.randomness import kept_generators
from lightning_dp.sandbox.snapshot import Snapshot

USE_OPTIMIZERS = (
    "Step through self.optimizers(), with self.manual_backward for the backward: only such a step gets a private "
    "gradient."
)
#: A warning where user code steps a scheduler on trial, in which its optimizer does not step.
_STEPPED_BY_HAND = r"Detected call of `lr_scheduler\.step\(\)` before"


class StepGuard:
    """A guard that refuses every optimizer step on private parameters without a released gradient.

    It hooks all optimizers of the process while a fit runs, including optimizers that a module keeps for itself. In the
    sandbox it refuses steps of all optimizers.

    Args:
        is_private: tells whether an optimizer holds a private parameter.
        advice: the supported way to step an optimizer, for messages.
    """

    def __init__(self, is_private: Callable[[Optimizer], bool], advice: str = USE_OPTIMIZERS) -> None:
        self._is_private, self._advice = is_private, advice
        self._handle: Any = None
        self._expected: list[Optimizer] = []
        self._closures: list[Any] = []  # for the expected optimizer, and given to it
        self._open = False
        self.in_sandbox = 0

    def start(self) -> None:
        """Start watching; a second call does nothing."""
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._check)

    def stop(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allow all steps within the context, because torch initialises optimizer state by a step of length 0."""
        watched = self._handle is not None
        self.stop()
        try:
            yield
        finally:
            if watched:
                self.start()

    @contextmanager
    def stepping(self, optimizer: Optimizer, closure: Any = None) -> Iterator[None]:
        """Allow the step of one optimizer within the context, and other steps once its gradient is released.

        Args:
            optimizer: it may hand the closure on to another one.
            closure: makes gradients private.
        """
        self._expected.append(optimizer)
        self._closures = [closure]
        try:
            yield
        finally:
            self._expected.pop()
            self._closures = []
            self._open = False

    @contextmanager
    def user_code(self) -> Iterator[None]:
        """Allow no step on private parameters within the context, in which user code such as a closure runs."""
        before, self._open = self._open, False
        expected, self._expected = self._expected, []
        try:
            yield
        finally:
            self._open, self._expected = before, expected

    def released(self) -> None:
        """Allow all further steps within the current one, because all gradients are private now."""
        self._open = True

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        kind = type(optimizer).__name__
        given = [one for one in (*args, *kwargs.values()) if callable(one)]
        if self._expected and optimizer is self._expected[-1]:
            self._closures += given
            return
        given += [one for wrapped in given for one in _held(wrapped) if callable(one)]
        if self._open or (self._expected and any(one is own for one in given for own in self._closures)):
            return  # an optimizer may hand its closure, which makes gradients private, on to another
        if self.in_sandbox:
            raise PrivacyError(
                f"{kind} stepped by itself while your step ran on trial, so weights would move on raw gradients. "
                f"{self._advice}"
            )
        if not self._is_private(optimizer):
            return
        raise PrivacyError(f"{kind} stepped private parameters by itself, without a private gradient. {self._advice}")


def _held(closure: Any) -> list[Any]:
    """Return what a closure calls, perhaps: arguments of a partial function, and variables of an enclosing function."""
    if isinstance(closure, partial):
        return [*closure.args]
    return [*map(content_of, closure.__closure__ or ())] if isinstance(closure, FunctionType) else []


class Sandbox:
    """A sandbox for user code, whose effects on module, optimizers, schedulers and random generators are undone.

    Within :meth:`enter` no optimizer may step (see ``StepGuard``), and ``.grad`` of every parameter is None at first.
    Afterwards, all state of module, optimizers and schedulers has its earlier value (see ``Snapshot``), and so have
    ``.grad`` and the global generators.

    Args:
        module: the user's.
        guard: guard over optimizer steps.
        others: returns the optimizers and schedulers.
        quiet: context manager that silences logs and progress of the host.
        settle: brings the module into its state between two steps.
        kept: takes note of what the collate function keeps, and returns a function that puts it back.
    """

    def __init__(
        self,
        module: nn.Module,
        guard: StepGuard,
        others: Callable[[], Iterable[Any]],
        quiet: Callable[[], Any],
        settle: Callable[[], None] = lambda: None,
        kept: Callable[[], Callable[[], object]] | None = None,
    ) -> None:
        self._module, self._guard, self._others, self._quiet = module, guard, others, quiet
        self._settle, self._kept = settle, kept
        self._last: Snapshot | None = None  # of the last series; the next one takes its memory
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext
        """Returns a context in which a watch of what user code writes does not look."""

    def others(self) -> list[Any]:
        """Return the optimizers and schedulers."""
        return [*self._others()]

    def snapshot(self) -> Snapshot:
        """Return a snapshot of module, optimizers and schedulers."""
        return Snapshot([self._module, *self._others()], self._settle, kept=self._kept)

    @contextmanager
    def series(self, *, is_trial: bool = False) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Run several pieces of code without effect, each from the same state.

        Args:
            is_trial: whether trials run, which watch operations, so that nothing is compiled.

        Yields:
            A function that returns the context of a piece. After a piece large tensors are compared quickly; the end of
            the series puts everything back exactly.
        """
        if self._last is None or not self._last.renew([self._module, *self._others()]):
            self._last = Snapshot([self._module, *self._others()], self._settle)
        with self.enter(self._last, is_trial=is_trial) as snapshot:
            parameters = list(self._module.parameters())

            @contextmanager
            def piece() -> Iterator[None]:
                try:
                    yield
                finally:
                    snapshot.put_back(quick=True)
                    for parameter in parameters:
                        parameter.grad = None

            yield piece

    @contextmanager
    def enter(self, taken: Snapshot | None = None, *, is_trial: bool = True) -> Iterator[Snapshot]:
        """Run what is inside without effect; ``taken`` is a snapshot of the present state, if there is one."""
        with self.aside(), self._entered(taken, is_trial=is_trial) as snapshot:
            yield snapshot

    @contextmanager
    def _entered(self, taken: Snapshot | None, *, is_trial: bool) -> Iterator[Snapshot]:
        self._settle()
        taken = taken or self.snapshot()
        gradients = [(parameter, parameter.grad) for parameter in self._module.parameters()]
        device = next((parameter.device for parameter, _ in gradients), torch.device("cpu"))
        for parameter, _ in gradients:
            parameter.grad = None
        self._guard.in_sandbox += 1
        try:
            eager = uncompiled() if is_trial else nullcontext()  # trials watch operations
            calm = torch.autograd.set_detect_anomaly(False)  # trials make records NaN
            with kept_generators(device), self._quiet(), eager, calm, without_warnings(_STEPPED_BY_HAND):
                yield taken
        finally:
            self._guard.in_sandbox -= 1
            taken.put_back()
            for parameter, gradient in gradients:
                parameter.grad = gradient
