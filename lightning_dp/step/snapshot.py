"""Snapshot: copies of everything that user code can change, to restore it later."""

from __future__ import annotations

import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping, MutableSequence, MutableSet
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp.step.local import local_part
from lightning_dp.step.randomness import generator_restorer
from lightning_dp.system.torch_private import num_changes

#: Attributes of every module that are not the user's state: hooks, and the dictionaries that are followed by
#: themselves.
_MACHINERY = frozenset(nn.Module().__dict__) - {
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
}  # fmt: skip
#: Attributes that lead out of the user's objects.
_OUTSIDE = frozenset({"log", "log_dict", "_trainer", "trainer", "_fabric", "_jit_is_scripting", "_metric_attributes"})
#: Types whose values cannot change.
_CONSTANT = (
    bool, int, float, complex, str, bytes, type(None), type, range, torch.dtype, torch.device, torch.Size,
    types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, Dataset, DataLoader,
)  # fmt: skip
#: Packages whose objects are not followed: they are no state of the user's, or lead to everything else.
_FOREIGN = (
    "lightning.", "pytorch_lightning.", "lightning_dp.", "torch.distributed", "logging", "threading", "_thread",
    "weakref", "_io",
)  # fmt: skip
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
_EMPTY = object()
"""Value of a slot that was never set."""
_DEEPEST = 12
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types whose values show the bits of a floating-point type of as many bytes."""
_LARGE = 2**14
"""Elements above which a quick comparison looks at about 1,000 of a tensor's elements."""


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the user's own attributes of one module, without parameters, buffers and submodules."""
    machinery = _OUTSIDE | _MACHINERY | {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    return {name: value for name, value in vars(module).items() if name not in machinery}


def few_values(tensor: Tensor, num: int) -> Tensor:
    """Return ``num`` values spread evenly over a tensor, in float64; none for an empty tensor."""
    flat = tensor.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, num if flat.numel() else 0, dtype=torch.float64).long()
    return flat[places.to(flat.device)].double()


class Snapshot:
    """Copies of all state that is reachable from given roots.

    Followed are modules (trainable and frozen parameters, all buffers, plain attributes), optimizers and schedulers
    (``state``, ``param_groups``, counters), containers of any class, numpy arrays, generators, and attributes of the
    user's own objects. Tensors are kept by value: also what is written through ``.data`` is found.

    **Guarantee**: after :meth:`put_back`, everything followed has the value that it had, in the same objects. NOT
    followed: objects that are reachable only through closures, globals or C extensions, and what a trainer holds.

    Args:
        roots: modules, optimizers, schedulers.
        settle: brings modules into their state between two steps; called before values are copied or restored.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.seen = [1.0]
        >>> snapshot = Snapshot([layer])
        >>> layer.weight.data.zero_(), layer.seen.append(2.0)  # doctest: +ELLIPSIS
        (tensor([[0., 0.]]), None)
        >>> snapshot.put_back()
        >>> layer.seen, bool((layer.weight == 0).any())
        ([1.0], False)
    """

    def __init__(self, roots: Iterable[Any], settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        settle()
        self._restore: list[Callable[[], Any]] = []
        self._tensors: list[_KeptTensor] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no id is used again
        for root in roots:
            self._follow(root, 0)
        self._together: _Together | None = None

    def put_back(self, *, quick: bool = False) -> None:
        """Restore every value; write only to those that have changed.

        Args:
            quick: of a large tensor whose version has not moved compare about 1,000 elements only. What this misses,
                the next exact call finds.
        """
        self._settle()
        with torch.no_grad():
            for restore in self._restore:
                restore()
            if quick and self._are_unchanged():
                return
            for kept in self._tensors:
                kept.put_back(quick=quick)

    def _are_unchanged(self) -> bool:
        if self._together is None:
            self._together = _Together(self._tensors)
        return self._together.are_unchanged()

    def _follow(self, value: Any, depth: int) -> None:
        if isinstance(value, _CONSTANT) or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, np.ndarray):
            self._keep_array(value)
        elif isinstance(value, _GENERATORS):
            self._restore.append(generator_restorer(value))
        elif isinstance(value, MutableMapping):
            self._keep(value, dict(value), _refill_mapping)
            self._follow_all([*value.values()], depth)
            self._follow_attributes(value, depth)
        elif isinstance(value, (MutableSequence, deque)):
            self._keep(value, list(value), _refill_sequence)
            self._follow_all(list(value), depth)
            self._follow_attributes(value, depth)
        elif isinstance(value, MutableSet):
            self._keep(value, set(value), _refill_mapping)
            self._follow_attributes(value, depth)
        elif isinstance(value, tuple):
            self._follow_all(list(tuple.__iter__(value)), depth)  # a subclass may refuse to be counted
        elif isinstance(value, frozenset):
            self._follow_all(list(value), depth)
        elif isinstance(value, nn.Module):
            self._follow_attributes(value, 0)
        elif not any(kind.__module__.startswith(_FOREIGN) for kind in type(value).__mro__):
            self._follow_attributes(value, depth)

    def _follow_all(self, values: list[Any], depth: int) -> None:
        for value in values:
            self._follow(value, depth + 1)

    def _follow_attributes(self, owner: Any, depth: int) -> None:
        skipped = _OUTSIDE | _MACHINERY if isinstance(owner, nn.Module) else _OUTSIDE
        attributes = getattr(owner, "__dict__", None)
        if isinstance(attributes, dict):
            before = {name: value for name, value in attributes.items() if name not in skipped}
            whole = dict(attributes)
            self._restore.append(lambda: _reset_attributes(attributes, before, skipped, whole))
            self._follow_all(list(before.values()), depth)
        for name in _slots(type(owner)):
            self._keep_slot(owner, name, depth)

    def _keep_tensor(self, tensor: Tensor) -> None:
        part, requires_grad = local_part(tensor), tensor.requires_grad
        self._tensors.append(_KeptTensor(part))
        if part is not tensor:
            self._restore.append(lambda: tensor.requires_grad_(requires_grad))

    def _keep_slot(self, owner: Any, name: str, depth: int) -> None:
        value = getattr(owner, name, _EMPTY)

        def restore() -> None:
            if getattr(owner, name, _EMPTY) is value:
                return
            if value is _EMPTY:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, value)

        self._restore.append(restore)
        self._follow(value, depth + 1)

    def _keep(self, holder: Any, content: Any, refill: Callable[[Any, Any], None]) -> None:
        def restore() -> None:
            if not _same_content(holder, content):
                refill(holder, content)

        self._restore.append(restore)

    def _keep_array(self, array: Any) -> None:
        content, shape, writeable = array.copy(), array.shape, array.flags.writeable

        def restore() -> None:
            if array.flags.writeable != writeable:
                array.setflags(write=writeable)
            if array.size != content.size:
                array.resize(shape, refcheck=False)
            elif array.shape != shape:
                array.shape = shape
            if writeable:
                array[...] = content

        self._restore.append(restore)


class _KeptTensor:
    """A tensor, its memory, and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias = tensor, tensor.detach()
        self.is_leaf, self.requires_grad = tensor.is_leaf, tensor.requires_grad
        self.memory = _memory_of(self.alias)
        self.value = self.memory.clone()
        self.version = num_changes(tensor)
        self.step = self.value.numel() // 1024 if self.value.numel() > _LARGE and self.value.is_contiguous() else 0

    def put_back(self, *, quick: bool) -> None:
        tensor, alias = self.tensor, self.alias
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            tensor.data = self.value.clone()
            return
        if self.is_leaf and not tensor.is_leaf:  # an operation in place has made it part of a graph
            tensor.detach_()
        now = tensor.detach()
        if _place_of(now) != _place_of(alias):
            tensor.data = alias
        elif quick and self.step and num_changes(tensor) == self.version and self._sample_is_same():
            return
        if not same_values(self.memory, self.value):
            self.memory.copy_(self.value)
        self.version = num_changes(tensor)
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)

    def _sample_is_same(self) -> bool:
        return same_values(self.memory.view(-1)[:: self.step], self.value.view(-1)[:: self.step])


class _Together:
    """Kept tensors that are compared in a few calls, as a quick comparison of each would.

    Args:
        tensors: kept.
    """

    def __init__(self, tensors: list[_KeptTensor]) -> None:
        self._large = [kept for kept in tensors if kept.step]
        self._places = [(kept.tensor, *_place_of(kept.alias), kept.requires_grad) for kept in tensors]
        self._comparable = all(
            kept.tensor.layout == torch.strided and kept.memory.is_contiguous() and kept.memory.device.type != "meta"
            for kept in tensors
        )
        pieces: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for kept in tensors if self._comparable else ():
            memory, value = (_bits_of(one).view(-1)[:: kept.step or 1] for one in (kept.memory, kept.value))
            pieces.setdefault((memory.dtype, memory.device), []).append((memory, value))
        self._pieces = [
            ([now for now, _ in pairs], torch.cat([then for _, then in pairs])) for pairs in pieces.values()
        ]

    def are_unchanged(self) -> bool:
        """Tell whether all are as they were kept; False also where some have to be compared by themselves."""
        if not self._comparable or any(num_changes(kept.tensor) != kept.version for kept in self._large):
            return False
        for tensor, address, dtype, shape, strides, requires_grad in self._places:
            if tensor.data_ptr() != address or tensor.dtype != dtype or tensor.requires_grad != requires_grad:
                return False
            if tensor.shape != shape or tensor.stride() != strides:
                return False
        return all(torch.equal(torch.cat(now), then) for now, then in self._pieces)


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _memory_of(tensor: Tensor) -> Tensor:
    """Return a writable tensor over the same memory: its flat memory if elements overlap, else the tensor."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)) if span < tensor.numel() else tensor


def _slots(kind: type) -> list[str]:
    """Return the names of all slots of a class, private ones as Python mangles them."""
    found: list[str] = []
    for each in kind.__mro__:
        own = vars(each).get("__slots__", ())
        for name in [own] if isinstance(own, str) else own:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{each.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _reset_attributes(
    attributes: dict[str, Any], before: dict[str, Any], skipped: frozenset[str], whole: dict[str, Any]
) -> None:
    if _same_items(attributes, whole):
        return
    for name in [name for name in attributes if name not in before and name not in skipped]:
        del attributes[name]
    for name, value in before.items():
        if attributes.get(name, _MACHINERY) is not value:
            attributes[name] = value


def _same_content(holder: Any, content: Any) -> bool:
    """Tell whether a container holds the same objects in the same order."""
    if len(holder) != len(content):
        return False
    if isinstance(content, dict):
        return _same_items(holder, content)
    if isinstance(content, set):
        return all(item in content for item in holder)
    return all(map(operator.is_, holder, content))


def _same_items(holder: Any, content: dict[Any, Any]) -> bool:
    """Tell whether a mapping holds the same objects under the same keys, in the same order."""
    return (
        len(holder) == len(content)
        and all(map(operator.is_, holder.values(), content.values()))
        and all(map(operator.is_, holder, content))
    )


def _refill_mapping(holder: Any, content: Any) -> None:
    holder.clear()
    if isinstance(content, dict):
        for key, value in content.items():
            holder[key] = value
    else:
        for item in content:
            holder.add(item)


def _refill_sequence(holder: Any, content: list[Any]) -> None:
    if hasattr(holder, "clear"):
        holder.clear()
    else:  # array.array before Python 3.13
        del holder[:]
    holder.extend(content)


def same_values(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal bit by bit, NaN and the sign of zero included."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bits_of(left), _bits_of(right))


def _bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor of integers that are equal exactly if the bits of the values are."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_floating_point():
        return tensor.resolve_neg().view(_WHOLE_NUMBERS[tensor.element_size()])
    return tensor
