"""Uses of private parameters that no learned layout explains: they are refused only where the loss depends on them.

User code also computes figures from weights, such as how far they have moved since the last step, and drops them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.nodes import Reporting

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


class UnlearnedError(PrivacyError):
    """The error of a use that no learned layout explains."""


class _Refusing(torch.autograd.Function):
    """An identity operation whose backward raises an error."""

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, source: Tensor, error: UnlearnedError) -> Tensor:
        ctx.error = error
        return output.detach()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ctx.error


def general(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that has no rule. If no learned layout explains it, its result raises an error in the backward.

    Raises:
        UnlearnedError: such an operation changes a tensor in place, or has another result than one tensor.
    """
    try:
        return tracker.general(func, args, kwargs)
    except UnlearnedError as error:
        tensors, name = tensors_in(args, kwargs), func.__name__
        if "out" in kwargs or name.endswith("_") or name.startswith("__i"):
            raise
        with torch.no_grad():
            out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or isinstance(out, Reporting) or any(out is tensor for tensor in tensors):
            raise
        if not (out.is_floating_point() or out.is_complex()):
            return out
        return _Refusing.apply(out, tracker.recorder.tap_source(out.device), error)  # type: ignore[no-untyped-call]
