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


def changes_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return ``num_changes`` of each tensor."""
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:  # of an inference tensor
        return tuple([num_changes(tensor) for tensor in tensors])


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
    found: dict[int, nn.Parameter] = {}
    for layer in layers:
        for parameter in layer._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return [*found.values()]


def buffers_of(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Return the buffers that layers hold themselves, each once."""
    found: dict[int, Tensor] = {}
    for layer in layers:
        for buffer in layer._buffers.values():
            if buffer is not None:
                found[id(buffer)] = buffer
    return [*found.values()]


_ASK = (nn.Module.named_parameters, nn.Module.named_modules)


def named_parameters_of(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters in a module with their names: as ``module.named_parameters()``, in less time."""
    if any(getattr(getattr(module, ask.__name__), "__func__", None) is not ask for ask in _ASK):
        return [*module.named_parameters()]
    found: dict[int, tuple[str, nn.Parameter]] = {}
    seen = {id(module)}

    def collect(layer: nn.Module, prefix: str) -> None:
        for name, parameter in layer._parameters.items():
            if parameter is not None and id(parameter) not in found:
                found[id(parameter)] = prefix + name, parameter
        for name, child in layer._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                collect(child, f"{prefix}{name}.")

    collect(module, "")
    return [*found.values()]


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
