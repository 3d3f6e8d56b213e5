"""Access to private APIs of torch outside of ``per_sample``: one name per API, each with its own test."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NormWithStatistics: type[nn.Module] = nn.modules.batchnorm._NormBase
"""Base class of batch and instance norms, which may keep running statistics."""
BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of batch norms."""
InstanceNorm = nn.modules.instancenorm._InstanceNorm
"""Base class of instance norms."""


def replace_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own dictionary of direct submodules; assigning to an entry replaces a submodule."""
    return module._modules


def num_changes(tensor: Tensor) -> int:
    """Return the number of in-place changes of a tensor; -1 for inference tensors, which have no count."""
    return -1 if tensor.is_inference() else tensor._version


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return a module and all layers in it, each once: as ``module.modules()``, in less time."""
    layers, seen = [module], {id(module)}
    for layer in layers:  # grows on the way
        for child in layer._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                layers.append(child)
    return layers


def parameters_of(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that layers hold themselves, each once."""
    held = (parameter for layer in layers for parameter in layer._parameters.values() if parameter is not None)
    return [*{id(parameter): parameter for parameter in held}.values()]


def buffers_of(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Return the buffers that layers hold themselves, each once."""
    held = (buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None)
    return [*{id(buffer): buffer for buffer in held}.values()]


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Switch off, within a block, the hooks on leaf tensors that see their gradients."""
    held = [(tensor, tensor._backward_hooks, tensor._post_accumulate_grad_hooks) for tensor in tensors]
    held = [each for each in held if each[1] or each[2]]
    for tensor, _, _ in held:
        tensor._backward_hooks, tensor._post_accumulate_grad_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for tensor, before, after in held:
            tensor._backward_hooks, tensor._post_accumulate_grad_hooks = before, after


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the qualified names of a module's persistent buffers, with the buffers."""
    for prefix, part in module.named_modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def wrapped_sampler(sampler: Any) -> Any:
    """Return the sampler inside a distributed wrapper of Lightning, or the given sampler if there is none inside."""
    return getattr(sampler.dataset, "_sampler", sampler)
