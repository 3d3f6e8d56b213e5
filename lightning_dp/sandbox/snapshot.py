"""Snapshot: copies of state that user code can change, to restore it later."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSet
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample._torch import dense_parts_of, real_view, unfollowed
from lightning_dp.sandbox.kept_tensors import KeptTensor, Together, find_changed
from lightning_dp.sandbox.object_kinds import entries_of, kind_of, own_classes, slots_of, state_of_class
from lightning_dp.sandbox.randomness import generator_restorer
from lightning_dp.sandbox.refilling import (
    Stored,
    refill_mapping,
    refill_sequence,
    reset_attributes,
    reset_class,
    same_content,
    stored,
)
from lightning_dp.system.local import local_part

#: Attributes of every module that are not the user's state: hooks, and dictionaries that are followed by themselves.
_MACHINERY = frozenset(nn.Module().__dict__) - {
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
}  # fmt: skip
#: Hooks that a step may register, often with an attribute that says so.
_HOOKS = frozenset(["_forward_hooks", "_forward_pre_hooks"])
#: Attributes that lead out of the user's objects.
_OUTSIDE = frozenset(
    ["log", "log_dict", "print", "_trainer", "trainer", "_fabric", "_jit_is_scripting", "_metric_attributes"]
)
#: Name of an attribute of a class with further names of such attributes of its objects.
OWN_OUTSIDE = "_lightning_dp_outside"
#: Attributes of a module that are not the user's own: also parameters, buffers and submodules.
NOT_PLAIN = _OUTSIDE | _MACHINERY | {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_EMPTY = object()  # value of a slot that was never set
_DEEPEST = 12


def few_values(tensor: Tensor, num: int) -> Tensor:
    """Return ``num`` values spread evenly over a tensor, in float64; none for an empty tensor."""
    flat = real_view(dense_parts_of(tensor.detach())[-1]).reshape(-1)
    return flat[_places(flat.numel(), num, flat.device)].double()


def few_places(tensor: Tensor, num: int) -> Tensor:
    """Return at most ``num`` entries spread over a tensor, with the last one: a view if the tensor is contiguous."""
    tensor = real_view(dense_parts_of(tensor.detach())[-1])
    size, step = tensor.numel(), max(1, -(-tensor.numel() // num))
    count = -(-size // step)
    if not tensor.is_contiguous():
        return tensor.reshape(-1).flip(0)[::step]
    return tensor.as_strided((count,), (step,), tensor.storage_offset() + (size - 1) % step if size else 0)


@functools.lru_cache(4096)
def _places(size: int, num: int, device: torch.device) -> Tensor:
    return torch.linspace(0, size - 1, num if size else 0, dtype=torch.float64).long().to(device)


class Snapshot:
    """Copies of all state that is reachable from given roots.

    Followed are modules (trainable and frozen parameters, all buffers, plain attributes), optimizers and schedulers
    (``state``, ``param_groups``, counters), containers of any class, numpy arrays, generators, and attributes of the
    user's own objects and classes. Tensors are compared by value, so that writes through ``.data`` are found too.

    **Guarantee**: after :meth:`put_back`, everything followed has the value that it had, in the same objects. NOT
    followed: attributes of the Trainer, and objects that are reachable only through C extensions, closures or globals.
    The variables in closures and globals that user code may change are roots of their own (``UserVariables``).

    Args:
        roots: modules, optimizers, schedulers.
        settle: brings modules into their state between two steps; called before values are copied or restored.
        skipped: objects that are not followed.
        kept: takes note of further state, and returns a function that puts it back.

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

    def __init__(
        self,
        roots: Iterable[Any],
        settle: Callable[[], None] = lambda: None,
        *,
        skipped: Iterable[Any] = (),
        kept: Callable[[], Callable[[], object]] | None = None,
    ) -> None:
        self._settle = settle
        settle()
        self._restore: list[Callable[[], Any]] = [] if kept is None else [kept()]
        self._refill: list[Callable[[], Any]] = []  # of the containers below
        self._attributes: list[Mapping[str, Any]] = []  # of objects and classes
        self._readers: list[Callable[[str], Any]] = []  # of the same attributes
        self._names: list[list[str]] = []  # of those that are state
        self._mappings: list[dict[Any, Any]] = []
        self._others: list[Collection[Any]] = []  # lists, sets and queues
        self._tensors: list[KeptTensor] = []
        self._seen: dict[int, Any] = {id(each): each for each in skipped}  # holds them: no id is used again
        self._roots = [*roots]
        for root in self._roots:
            self._follow(root, 0)
        self._first = self._quick = self._held()
        self._together: Together | None = None

    def renew(self, roots: Iterable[Any]) -> bool:
        """Keep the present values instead, in the same memory.

        Returns:
            False if objects have been replaced since the snapshot was taken, or cannot be compared: then take another.
        """
        self._settle()
        with torch.no_grad():
            same = not self._restore and [*map(id, roots)] == [*map(id, self._roots)] and self._is_held(self._first)
            return same and self._all_tensors.renew()

    def put_back(self, *, quick: bool = False) -> None:
        """Restore every value; tensors and containers are written only if they have changed.

        Args:
            quick: whether to compare only about 1,000 elements of a large tensor whose version is unchanged. The next
                exact call finds changes that this misses.
        """
        self._settle()
        with torch.no_grad(), unfollowed():  # an engine may record
            if not self._is_held(self._quick if quick else self._first):
                for refill in self._refill:
                    refill()
                if quick:  # with what the host has put there since, such as the silent ``self.log``
                    self._quick = self._held()
            for restore in self._restore:
                restore()
            unchanged = self._all_tensors.are_unchanged()
            if quick and unchanged:
                return
            tensors = [kept for kept in self._tensors if kept.is_large] if unchanged else self._tensors
            unknown: list[bool | None] = [None] * len(tensors)
            changed = unknown if quick else find_changed(tensors)
            for kept, differs in zip(tensors, changed, strict=True):
                kept.put_back(quick=quick, changed=differs)

    def _held(self) -> tuple[list[int], list[Any]]:
        return [*map(len, self._containers())], [*self._contents()]

    def _is_held(self, held: tuple[list[int], list[Any]]) -> bool:
        """Tell whether all containers hold the same objects as at an earlier time, under the same keys."""
        sizes, contents = held
        try:
            return [*map(len, self._containers())] == sizes and all(map(operator.is_, self._contents(), contents))
        except KeyError:  # an attribute is gone
            return False

    def _containers(self) -> list[Collection[Any]]:
        return [*self._attributes, *self._mappings, *self._others]

    def _contents(self) -> Iterator[Any]:
        """Yield attributes by name, the values of other dictionaries, and the keys or elements of all but objects."""
        attributes = map(map, self._readers, self._names)
        values, keys = map(dict.values, self._mappings), [*self._mappings, *self._others]
        return itertools.chain.from_iterable(itertools.chain(attributes, values, keys))

    @property
    def _all_tensors(self) -> Together:
        self._together = self._together or Together(self._tensors)
        return self._together

    def _follow(self, value: Any, depth: int) -> None:
        kind = kind_of(value.__class__)
        if kind == "constant" or id(value) in self._seen or depth > _DEEPEST:
            return
        self._seen[id(value)] = value
        if kind == "tensor":
            self._keep_tensor(value)
        elif kind == "array":
            self._keep_array(value)
        elif kind == "generator":
            self._restore.append(generator_restorer(value))
        elif kind == "container":
            self._follow_container(value, depth)
            self._follow_attributes(value, depth)
        elif kind in ("fixed", "bound"):
            self._follow_all(entries_of(value), depth)
        elif kind == "module":
            self._follow_attributes(value, 0)
        elif not depth or kind == "own":
            self._follow_attributes(value, depth)

    def _follow_container(self, value: Any, depth: int) -> None:
        if isinstance(value := stored(value), Stored):
            content: Any = value.whole()
            self._keep(value, content, refill_mapping)
            self._follow_all([*content.values()], depth)
            return
        kind = dict if isinstance(value, MutableMapping) else set if isinstance(value, MutableSet) else list
        try:
            content = kind(value)
        except Exception:  # it cannot be read, such as a configuration that is None: its attributes hold all it has
            return
        self._keep(value, content, refill_sequence if kind is list else refill_mapping)
        if kind is not set:
            self._follow_all([*content.values()] if kind is dict else content, depth)

    def _follow_all(self, values: list[Any], depth: int) -> None:
        for value in values:
            self._follow(value, depth + 1)

    def _follow_attributes(self, owner: Any, depth: int) -> None:
        skipped = (
            _OUTSIDE | _MACHINERY
            if isinstance(owner, nn.Module)
            else _OUTSIDE | getattr(type(owner), OWN_OUTSIDE, frozenset())
        )
        attributes = getattr(owner, "__dict__", None)
        if isinstance(attributes, dict):
            before = {name: value for name, value in attributes.items() if name not in skipped}
            self._keep_attributes(attributes, before, lambda: reset_attributes(attributes, before, skipped), depth)
            for name in _HOOKS & attributes.keys() if isinstance(owner, nn.Module) else ():
                self._keep(attributes[name], dict(attributes[name]), refill_mapping)
        for name in slots_of(owner.__class__):
            self._keep_slot(owner, name, depth)
        for kind in own_classes(owner.__class__):
            if id(kind) not in self._seen:
                self._seen[id(kind)], state = kind, state_of_class(kind)
                self._keep_attributes(vars(kind), state, functools.partial(reset_class, kind, state), depth)

    def _keep_attributes(
        self, held: Mapping[str, Any], state: dict[str, Any], refill: Callable[[], None], depth: int
    ) -> None:
        self._attributes.append(held)
        self._readers.append(held.__getitem__)
        self._names.append([*state])
        self._refill.append(refill)
        self._follow_all([*state.values()], depth)

    def _keep_tensor(self, tensor: Tensor) -> None:
        part, requires_grad = local_part(tensor), tensor.requires_grad
        self._tensors.append(KeptTensor(part))
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
            if not same_content(holder, content):
                refill(holder, content)

        if isinstance(content, dict) and isinstance(holder, dict):
            self._mappings.append(holder)
        elif type(holder) in (list, set, deque):
            self._others.append(holder)
        else:
            self._restore.append(restore)
            return
        self._refill.append(restore)

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
