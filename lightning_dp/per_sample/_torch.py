"""Private API of torch that per-sample gradients need, one function each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def unreported() -> AbstractContextManager[None]:
    """Return a context in which operations do not report themselves to tracked tensors."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def unfollowed() -> AbstractContextManager[None]:
    """Return a context in which operations report neither to tracked tensors nor to modes."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def in_backward() -> bool:
    """Tell whether autograd is running a backward; a forward within it is a recomputation (checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def keeps_graph() -> bool:
    """Tell whether the current backward keeps, or may keep, its graph for another one (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def is_view(tensor: Tensor) -> bool:
    """Tell whether a tensor is a view of another one, as autograd sees it."""
    return tensor._is_view()


def own_view(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory that autograd does not count as a view."""
    alone: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return alone


def arguments_of(func: Any) -> tuple[str, list[Any]]:
    """Return the name of a dispatched operation, without suffixes, and its declared arguments."""
    return func._schema.name.removeprefix("aten::").rstrip("_"), list(func._schema.arguments)


def is_compiled(module: Any) -> bool:
    """Tell whether ``torch.compile`` was applied to a module, by a wrapper or in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def norms_of(tensors: list[Tensor]) -> list[Tensor]:
    """Return the L2 norms of tensors, in one call."""
    return list(torch._foreach_norm(tensors))


def add_scaled(targets: list[Tensor], tensors: list[Tensor], factor: float) -> None:
    """Add ``factor * tensor`` to each target, in one call."""
    torch._foreach_add_(targets, tensors, alpha=factor)


def fused_kernel(kind: str) -> Callable[..., Any]:
    """Return the recurrent kernel of that name, such as ``"lstm"``."""
    kernel: Callable[..., Any] = getattr(torch._VF, kind)
    return kernel
