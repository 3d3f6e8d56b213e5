"""Looks at a module that also show what nothing counts: values written through ``.data``, and changed containers."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import MutableMapping, MutableSequence, MutableSet, Set
from itertools import compress, filterfalse
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample._torch import dense_parts_of, unfollowed
from lightning_dp.sandbox.kept_tensors import same_values
from lightning_dp.sandbox.looks import Look
from lightning_dp.sandbox.refilling import same_content
from lightning_dp.sandbox.snapshot import NOT_PLAIN, few_places
from lightning_dp.system.local import local_part
from lightning_dp.system.torch_private import Layers, changes_of, num_changes

_CONTAINERS = (MutableSequence, MutableMapping, MutableSet, deque)
_WORD = re.compile(r"\w+")
_PLACES = 16  # values of a tensor that are compared


class CloseLook(Look):
    """A look that also reads some values of each tensor, gradients included, and how much containers hold.

    Args:
        eye: reads them.
        others: optimizers and schedulers.
        owner: of a hook, whose attributes :meth:`back_in` restores.
        more: attributes of further objects, and variables.
        saves: whether the attributes of the owner are state.
        last: an earlier look, which makes this one cheaper.
    """

    def __init__(
        self,
        eye: Eye,
        others: list[Any],
        owner: Any,
        more: list[Any],
        *,
        saves: bool,
        last: CloseLook | None = None,
    ) -> None:
        super().__init__(eye.layers, others, [vars(owner), *more], last)
        self._num_watched = len(self.held) - len(more) - (not saves)  # attributes that are all state
        all_names: list[str] = []
        self.values: list[Any] = []
        for attributes in (*map(vars, self.layers), vars(owner) if saves else {}):
            names = [*filterfalse(NOT_PLAIN.__contains__, attributes)]
            all_names += names
            self.values += map(attributes.__getitem__, names)
        self.counts = all_names, eye.sizes(self.values), self.numbers, self.states.changes
        self.values += self.states.tensors
        with unfollowed():
            grads = [tensor.grad for tensor in self.tensors if tensor.is_leaf and tensor.grad is not None]
            held = [part for tensor in self.tensors for part in dense_parts_of(local_part(tensor))]
            grads = [*map(local_part, grads)]
            self.marks = self.trains, changes_of([*held, *grads]), [*map(Tensor.data_ptr, [*held, *grads])]
            self.entries = eye.places.read(held), eye.places_of_grads.read(grads)

    def is_same(self, after: CloseLook, mentioned: Set[str], *, tensors_only: bool) -> bool:
        """Tell whether a later look shows the same state.

        Args:
            after: the later look.
            mentioned: words that the module's steps mention, by one of which they would reach what is further away.
            tensors_only: whether attributes, and numbers of optimizers and schedulers, do not count.
        """
        if self.marks != after.marks or not all(map(same_values, self.entries, after.entries)):
            return False
        if tensors_only:
            return True
        for (_, first, *path), *_ in self.contents.writes_until(after.contents):
            is_near = isinstance(first, str) or first < self._num_watched  # also of a class
            named = [each.partition(" of ")[0] for each in path]  # without the function that a variable belongs to
            if is_near or not mentioned.isdisjoint([*named, *_WORD.findall(" ".join(named))]):
                return False
        return self.counts == after.counts and same_content(after.values, self.values)


class Eye:
    """The layers of a module, with what close looks at it share so that they cost less.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = Layers(module)
        self.places, self.places_of_grads = Places(), Places()
        self._known: set[type[Any]] = set()
        self._changing: set[type[Any]] = set()

    def sizes(self, values: list[Any]) -> list[int]:
        """Return the lengths of the containers among values, and the numbers of changes of the tensors."""
        new = set(map(type, values)) - self._known
        self._known |= new
        self._changing |= {kind for kind in new if issubclass(kind, (Tensor, *_CONTAINERS))}
        sized = compress(values, map(self._changing.__contains__, map(type, values)))
        return [num_changes(value) if isinstance(value, Tensor) else len(value) for value in sized]


class Places:
    """Some entries of tensors, as views that are read again and again while the tensors and their memory stay."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._layouts: list[Any] = []
        self._views: list[list[Tensor]] = []

    @torch.no_grad()
    def read(self, tensors: list[Tensor]) -> Tensor:
        """Return the entries, joined on one device to be compared by one transfer."""
        layouts = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        if layouts != self._layouts or not same_content(tensors, self._tensors):
            alike: dict[Any, list[Tensor]] = {}
            for tensor in tensors:
                alike.setdefault((tensor.device, tensor.dtype), []).append(few_places(tensor, _PLACES))
            lasting = all(tensor.is_contiguous() for tensor in tensors)  # of others the entries are copies
            self._layouts, self._tensors, self._views = layouts, tensors if lasting else [None], [*alike.values()]
        joined = [torch.cat(views) for views in self._views]
        if len(joined) == 1:
            return joined[0]
        return torch.cat([values.double().to(joined[0].device) for values in joined]) if joined else torch.empty(0)
