"""Every private API of torch that the package uses outside of ``per_sample``: one function each, with its own test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

NormWithStatistics: type[nn.Module] = nn.modules.batchnorm._NormBase
"""Base class of batch and instance norms, which may keep running statistics."""


def replace_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own dictionary of its direct submodules; assigning to an entry replaces a submodule."""
    return module._modules


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is one that ``torch.compile`` returned, or was compiled in place by Lightning."""
    return getattr(module, "_compiler_ctx", None) is not None or hasattr(module, "_orig_mod")


def num_changes(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; -1 if torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the persistent buffers of a module, with their qualified names."""
    for prefix, part in module.named_modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def wrapped_sampler(sampler: Any) -> Any:
    """Return the sampler inside one of Lightning's distributed wrappers; the wrapper itself if it holds none."""
    return getattr(sampler.dataset, "_sampler", sampler)
