"""ReleaseGuard: optimizers of the user's own loop step on released gradients only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.sandbox import StepGuard

ADVICE = "Let the private run make the gradient first: step(batch), or backward(...) followed by the optimizer's step."


class ReleaseGuard(StepGuard):
    """A guard that refuses optimizer steps on anything but the gradient of the last release.

    Raw gradients are refused where autograd writes them; gradients that somebody put in place of the released ones are
    refused when an optimizer steps. Changing a released gradient in place (clipping it, say) is post-processing.

    Args:
        model: its parameters are private.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._holds_private, ADVICE)
        self._model = model
        self._parameters: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._working = False

    def _holds_private(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"])

    @override
    def start(self) -> None:
        super().start()
        self._follow()

    @override
    def stop(self) -> None:
        super().stop()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._gradients = [], {}

    def _follow(self) -> None:
        """Watch all parameters of the model, including new ones, and frozen ones because they may be unfrozen."""
        for parameter in self._model.parameters():
            if id(parameter) in self._parameters:
                continue
            self._parameters[id(parameter)] = parameter
            if parameter.is_floating_point():
                before = parameter.requires_grad
                parameter.requires_grad_(True)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._refuse_raw))  # type: ignore[no-untyped-call]
                parameter.requires_grad_(before)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Allow the private step to run the user's code within the context; no optimizer may step there."""
        self._follow()
        self._working, self._open, self._gradients = True, False, {}
        try:
            with self.user_code():
                yield
        finally:
            self._working = False

    @override
    def released(self) -> None:
        """Allow steps on the gradients that the parameters hold now."""
        super().released()
        self._gradients = self._held()

    @override
    @contextmanager
    def stepping(self, optimizer: Optimizer, closure: Any = None) -> Iterator[None]:
        """Expect the step of an optimizer on the gradients that the parameters hold now."""
        before, self._gradients = self._gradients, self._held()
        try:
            with super().stepping(optimizer, closure):
                yield
        finally:
            self._gradients = before

    def _held(self) -> dict[int, Tensor]:
        return {key: p.grad for key, p in self._parameters.items() if p.grad is not None}

    def _refuse_raw(self, parameter: Tensor) -> None:
        if self._working:
            return
        parameter.grad = None
        raise PrivacyError(
            "A backward outside of the private run wrote a raw gradient into a private parameter, which the next step "
            f"would use. {ADVICE} For other gradients use torch.autograd.grad."
        )

    @override
    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        super()._check(optimizer, args, kwargs)
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) in self._parameters):
            if parameter.grad is not None and parameter.grad is not self._gradients.get(id(parameter)):
                parameter.grad = None
                raise PrivacyError(
                    f"{type(optimizer).__name__} was about to step on a gradient that was put in place of the private "
                    f"one, so weights would move without noise. Change p.grad in place only. {ADVICE}"
                )
