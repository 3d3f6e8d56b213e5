"""Access to private APIs of torch outside of ``per_sample``: one name per API, each with its own test."""

from __future__ import annotations

import math
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

NormWithStatistics: type[nn.Module] = nn.modules.batchnorm._NormBase
"""Base class of batch and instance norms, which may keep running statistics."""
BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of batch norms."""
KERNELS: Any = torch._VF
"""The operations that torch's own Python code calls."""
InstanceNorm = nn.modules.instancenorm._InstanceNorm
"""Base class of instance norms."""


sparse_sum: Callable[..., Tensor] = torch._sparse_sum
"""The function behind ``torch.sparse.sum``, which tensors report."""


def is_lazy_layer(layer: nn.Module) -> bool:
    """Tell whether a layer has parameters without a shape, or becomes another class at its next call."""
    return hasattr(layer, "_initialize_hook") or any(map(is_lazy, layer.parameters(recurse=False)))


def replace_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own dictionary of direct submodules; assigning to an entry replaces a submodule."""
    return module._modules


def num_changes(tensor: Tensor) -> int:
    """Return the number of in-place changes of a tensor; -1 for inference tensors, which have no count."""
    return -1 if tensor.is_inference() else tensor._version


def num_hooks() -> int:
    """Return how many hooks were registered on tensors, modules and nodes of graphs since torch was imported."""
    return RemovableHandle.next_id


def changes_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return ``num_changes`` of each tensor."""
    try:
        return tuple([tensor._version for tensor in tensors])
    except RuntimeError:  # of an inference tensor
        return tuple([num_changes(tensor) for tensor in tensors])


def tensors_among(values: list[Any]) -> list[Tensor]:
    """Return the tensors in a list; each class is asked once, for which ``isinstance`` is slow."""
    kinds = {kind for kind in set(map(type, values)) if issubclass(kind, Tensor)}
    return [value for value in values if type(value) in kinds] if kinds else []


def size_of_result(node: Any, number: int) -> int:
    """Return the number of entries of a result of a differentiable operation; 0 if unknown."""
    given = getattr(node, "_input_metadata", ())
    return math.prod(given[number].shape) if number < len(given) else 0


def divisor_of(node: Any, size: int) -> Any:
    """Return what an operation divides the sum of its ``size`` entries by: a number, or a sum of weights; 1 if it does
    not.
    """
    kind: Any = type(node)
    if hasattr(kind, "_saved_reduction"):
        if node._saved_reduction != 1:  # no mean
            return 1
        return node._saved_total_weight if hasattr(kind, "_saved_total_weight") else size
    return node._saved_self_sym_numel if hasattr(kind, "_saved_self_sym_numel") else 1


_OF_TORCH = frozenset(vars(nn.Module()))


def _may_change(layer: nn.Module) -> bool:
    """Tell whether user code may keep something in attributes of a layer."""
    kind = type(layer)
    if not kind.__module__.startswith("torch.nn.") or isinstance(layer, nn.modules.dropout._DropoutNd):
        return True
    known = _OF_TORCH.union(
        getattr(kind, "__constants__", ()), *(getattr(one, "__annotations__", ()) for one in kind.__mro__)
    )
    return not known.issuperset(vars(layer))


_KEYS, _VALUES = operator.methodcaller("keys"), operator.methodcaller("values")
NUM_REGISTRIES = 5
"""Registries of one layer."""
_REGISTRIES = operator.attrgetter("_forward_hooks", "_forward_pre_hooks", "_parameters", "_buffers", "_modules")
_SILENCED = {"log", "log_dict", "print"}
"""Methods of the user's module that others replace while user code runs on trial."""
_ASK = (nn.Module.named_parameters, nn.Module.named_modules)


class Layers:
    """The layers of a module and what they hold; :meth:`now` walks through the module only if a layer in it was added,
    removed, exchanged or renamed, or got or lost an attribute.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._read()

    def _read(self) -> None:
        self.all: list[nn.Module] = []
        """The module and all layers in it, each once, in the order of ``module.modules()``."""
        self._prefixes: list[str] = []
        self._collect(self._module, "", {id(self._module)})
        self.own = [*filter(_may_change, self.all)]
        """Layers that are not of torch, or have a rate or attributes of the user's."""
        own = {*map(id, self.own)}
        self.plain = [(layer, {*vars(layer)}) for layer in self.all if id(layer) not in own]
        """The other layers, with the names of their attributes."""
        self._names, self._children = self._held()

    def _collect(self, layer: nn.Module, prefix: str, seen: set[int]) -> None:
        self.all.append(layer)
        self._prefixes.append(prefix)
        for name, child in layer._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                self._collect(child, f"{prefix}{name}.", seen)

    def _held(self) -> tuple[Any, list[nn.Module | None]]:
        """Return the number of direct submodules by layer with their names and of attributes, and these submodules."""
        num_attributes = sum(map(len, map(vars, self.all))) - len(_SILENCED & vars(self._module).keys())
        held = [layer._modules for layer in self.all]
        sizes, held = [*map(len, held)], [*filter(len, held)]
        names = [*chain.from_iterable(map(_KEYS, held))]  # a script's children are no dictionary
        return (sizes, names, num_attributes), [*chain.from_iterable(map(_VALUES, held))]

    def now(self) -> Layers:
        """Return the layers as they are now."""
        names, children = self._held()
        if names != self._names or not all(map(operator.is_, children, self._children)):
            self._read()
        return self

    def registries(self) -> list[Any]:
        """Return where each layer registers hooks on its forward, parameters, buffers and submodules: dictionaries, but
        of scripted layers.
        """
        return [*chain.from_iterable(map(_REGISTRIES, self.all))]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters with their names, as ``module.named_parameters()``."""
        module = self._module
        if any(getattr(getattr(module, ask.__name__), "__func__", None) is not ask for ask in _ASK):
            return [*module.named_parameters()]
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for layer, prefix in zip(self.all, self._prefixes, strict=True):
            for name, parameter in layer._parameters.items():
                if parameter is not None and id(parameter) not in found:
                    found[id(parameter)] = prefix + name, parameter
        return [*found.values()]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the layers hold, each once."""
        found = [p for layer in self.all if layer._parameters for p in layer._parameters.values() if p is not None]
        return [*dict(zip(map(id, found), found, strict=True)).values()]

    def buffers(self) -> list[Tensor]:
        """Return the buffers that the layers hold, each once."""
        found = [b for layer in self.all if layer._buffers for b in layer._buffers.values() if b is not None]
        return [*dict(zip(map(id, found), found, strict=True)).values()]

    def tensors(self) -> list[Tensor]:
        """Return the tensors without a gradient that the layers hold as plain attributes."""
        held = tensors_among([*chain.from_iterable(map(_VALUES, map(vars, self.own)))])
        return [tensor for tensor in held if not tensor.requires_grad]


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


def has_own_hooks(tensor: Tensor) -> bool:
    """Tell whether the user has put hooks on a leaf tensor that see its gradient."""
    hooks = (*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values())
    return any(not str(getattr(hook, "__module__", "")).startswith(("torch.", "lightning_dp.")) for hook in hooks)


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the qualified names of a module's persistent buffers, with the buffers."""
    for prefix, part in module.named_modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), value


def wrapped_sampler(sampler: Any) -> Any:
    """Return the sampler inside a distributed wrapper of Lightning, or the given sampler if there is none inside."""
    return getattr(sampler.dataset, "_sampler", sampler)


def views_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return views of a buffer, one after the other, in the shapes of tensors, in one call.

    Example:
        >>> [each.tolist() for each in views_like(torch.arange(3), [torch.empty(2, 1), torch.empty(1)])]
        [[[0], [1]], [2]]
    """
    views = torch._C._nn.unflatten_dense_tensors(flat, tensors)
    return [view if view.numel() else view.view(like.shape) for view, like in zip(views, tensors, strict=True)]


def watch_nonzero(see: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
    """Call a function with each argument and result of ``aten::nonzero``, by which torch also finds the rows that a
    mask as an index chooses; return the function that ends this. Operations of this kind take 7 microseconds longer.
    """

    def nonzero(tensor: Tensor) -> Tensor:
        found = torch.empty(0, dtype=torch.long, device=tensor.device)
        torch.ops.aten.nonzero.out(tensor, out=found)
        see(tensor, found)
        return found

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*previously registered kernel")
        for device in ("CPU", "CUDA", "MPS", "XPU"):
            if torch._C._dispatch_has_kernel_for_dispatch_key("aten::nonzero", device):
                library.impl("nonzero", nonzero, device)
    end: Callable[[], None] = library._destroy
    return end
