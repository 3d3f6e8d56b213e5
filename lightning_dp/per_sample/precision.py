"""The arithmetic of the engine: no autograd, no autocast, no float32 products of reduced precision."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def exact_arithmetic(device_type: str) -> AbstractContextManager[None]:
    """Return a context without autograd, autocast and reduced precision; it restores the settings at its end.

    A norm from Gram matrices and a weighted sum from another product agree only up to rounding. With TF32 or bfloat16
    products the rounding is 1e-3 of terms that may cancel, which is enough to void a sensitivity.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
    """
    # entered for every use of a parameter: to set what holds already would cost 20 microseconds each time
    shortened = [
        (where, name, before, value)
        for where, name, value in _switches(device_type)
        if (before := getattr(where, name)) != value and not (device_type == "cpu" and before == "none")
    ]
    if not (shortened or torch.is_grad_enabled() or torch.is_autocast_enabled(device_type)):
        return nullcontext()
    return _exactly(shortened, device_type)


@contextmanager
def _exactly(shortened: list[tuple[Any, str, Any, Any]], device_type: str) -> Iterator[None]:
    try:
        for where, name, _, value in shortened:
            setattr(where, name, value)
        with torch.no_grad():
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    yield
            else:
                yield
    finally:
        for where, name, before, _ in shortened:
            setattr(where, name, before)


@functools.cache
def _switches(device_type: str) -> list[tuple[Any, str, Any]]:
    """Return the precision switches of a device: (object, attribute, value for full precision)."""
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    sums = [(matmul, "allow_bf16_reduced_precision_reduction", False)] if device_type == "cuda" else []
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        return [(matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False), *sums]
    if device_type == "cuda":
        return [(matmul, "fp32_precision", "ieee"), (backends.cudnn.conv, "fp32_precision", "ieee"), *sums]
    return [(backends.mkldnn.matmul, "fp32_precision", "ieee"), (backends.mkldnn.conv, "fp32_precision", "ieee")]
