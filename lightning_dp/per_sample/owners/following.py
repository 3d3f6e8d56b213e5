"""The owners of rows, followed through all operations of a step if positions do not determine them.

Graphs, sets and loops over samples have no axis with equally many rows for each sample. For them the owners of every
data tensor are recorded, and each operation passes them on to its result (moves.py), in some microseconds.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lightning_dp.per_sample._torch import TensorSet, base_of, is_mapped, memory_of, unfollowed
from lightning_dp.per_sample.owners.assumed import Assumed
from lightning_dp.per_sample.owners.batch_reading import alias_among, shown_by
from lightning_dp.per_sample.owners.choices import chooses_rows
from lightning_dp.per_sample.owners.entries import after_mixed
from lightning_dp.per_sample.owners.memo import Memo, merged
from lightning_dp.per_sample.owners.moves import MADE_OF_NUMBERS, Step, keeps_to_positions, moved_entries, owners_after
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Owners, Rows, fits, may_change
from lightning_dp.per_sample.owners.quick import are_from_elsewhere, are_positions
from lightning_dp.per_sample.owners.telling import Telling
from lightning_dp.per_sample.owners.traits import SHOWS_NO_ENTRY, Traits, traits_of
from lightning_dp.per_sample.owners.views import owners_behind
from lightning_dp.per_sample.tracking.arguments import NO_TENSORS, first_by_position, tensors_in
from lightning_dp.per_sample.tracking.composites import entered
from lightning_dp.per_sample.tracking.functions import in_real_numbers
from lightning_dp.per_sample.tracking.nodes import Reporting, is_tracked
from lightning_dp.per_sample.tracking.operations import operation_of

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

_entered = functools.cache(entered)
_WRITTEN = Mixed("a view of memory that was written in place")
_SEVERAL = Mixed("rows of several samples that were written to one position")


class Follower(Telling):
    """A mode that records, for every tensor that an operation returns, which samples own its rows.

    **Guarantee**: a tensor without recorded owners counts as mixed, and no parameter may be used with it. Such a tensor
    was made outside the step or by code that reports no operations. An in-place write that changes the owners of a view
    makes all other views of the same memory mixed.

    Args:
        tracker: follows the parameters.
        size: number of samples in the microbatch.
        constants: buffers of the module: they hold no data.
    """

    def __init__(self, tracker: Tracker, size: int, constants: list[Tensor]) -> None:
        super().__init__()
        self.tracker, self.size, self.memo = tracker, size, Memo()
        self._constants = {id(tensor): tensor for tensor in constants}  # held, so that no other tensor gets their ids
        self._samples: dict[torch.device, Rows] = {}
        self._notes: dict[int, tuple[weakref.ref[Tensor], int, Owners]] = {}
        self._written: dict[int, tuple[int, Mixed]] = {}
        self.chosen = TensorSet()
        """Tensors of which data choose the rows, so that other values may leave other rows of each sample."""
        self.assumed = Assumed()
        """Tensors that hold a parameter repeated for every sample, as their length says; rows of other owners that they
        meet entry by entry are refused."""
        self._of_numbers, self._time, self._fresh, self._began = TensorSet(), 0, 0, False

    def identity(self, device: torch.device) -> Tensor:
        """Return the tensor ``0 ... B - 1`` on a device, the same object in every call."""
        return self.samples(device).index

    def samples(self, device: torch.device) -> Rows:
        """Return the owners of rows that are the samples in their order."""
        if device not in self._samples:
            self._samples[device] = Rows(0, torch.arange(self.size, device=device), is_identity=True)
            self.memo.known.insert(0, self._samples[device])
        return self._samples[device]

    def forget(self) -> None:
        """Forget the owners of all tensors made so far, because the step begins."""
        self._notes, self._began = {}, True

    def note(self, tensor: Tensor, owners: Owners) -> None:
        """Record the owners of a tensor."""
        self._notes[id(tensor)] = (weakref.ref(tensor), self._time, owners)

    def owners_of(self, tensor: Tensor) -> Owners:
        """Return the owners of a tensor: None for a constant, mixed if unknown or if several samples share a row."""
        owners, several = self._noted_owners(tensor), self.memo.several
        return _SEVERAL if several is not None and isinstance(owners, Rows) and owners.has(several) else owners

    def _noted_owners(self, tensor: Tensor) -> Owners:
        key = id(tensor)
        if key in self._constants or (type(tensor) is not Tensor and isinstance(tensor, (Reporting, nn.Parameter))):
            return None
        note = self._notes.get(key)
        if note is None or note[0]() is not tensor:
            return self._of_alias(tensor)
        if note[1] < self._time:
            if (write := self._written.get(memory_of(tensor), (0, MIXED)))[0] > note[1]:
                return write[1]
            self._notes[key] = note[0], self._time, note[2]
        return note[2]

    def _of_alias(self, tensor: Tensor) -> Owners:
        """Return, and record, the owners of a tensor that no operation has made, but another one with its entries."""
        other = alias_among(tensor, [one() for one, _, _ in self._notes.values()] if self._began else ())
        owners = MIXED if other is None else self._noted_owners(other)
        self.note(tensor, owners)
        for marked in (self.chosen, self.assumed, self._of_numbers):
            if other is not None and other in marked:
                marked.add(tensor)
        return owners

    def _given(self, args: Any, kwargs: Any) -> list[tuple[Tensor, Owners]]:
        """Return the tensors among arguments, in the order of :func:`tensors_in`, with their owners."""
        found: list[tuple[Tensor, Owners]] = []
        notes: dict[int, Any] = self._notes
        constants, now = self._constants, self._time
        for thing in args if not kwargs else (*args, *kwargs.values()):
            kind = type(thing)
            if kind is Tensor:
                key = id(thing)
                if key in notes and (note := notes[key])[1] == now and thing is note[0]() and key not in constants:
                    found.append((thing, note[2]))
                else:
                    found.append((thing, self._noted_owners(thing)))
            elif kind is tuple or kind is list:
                found += self._given(thing, None)
            elif kind not in NO_TENSORS:
                found += [(one, self._noted_owners(one)) for one in tensors_in((thing,), None)]
        return found

    def hand_on(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor | None]) -> None:
        """Give the owners of tensors, which broadcast, to results computed from them in a way that reports nothing."""
        self._fresh, found = 0, [(one.dim(), self._noted_owners(one)) for one in tensors if one is not None]
        owners: Owners = next((one.spread for _, one in found if isinstance(one, Mixed)), None)
        if owners is None:
            rows = [(axes, one) for axes, one in found if isinstance(one, Rows)]
            owners = merged(rows, max(axes for axes, _ in found), self.memo)
        is_chosen = any(tensor in self.chosen for tensor in tensors if tensor is not None)
        for result in [one for one in results if one is not None]:
            self.note(result, owners)
            if is_chosen:
                self.chosen.add(result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHOWS_NO_ENTRY:
            return func(*args, **kwargs) if kwargs else func(*args)
        args, kwargs = (args, kwargs or {}) if args else first_by_position(func, kwargs or {})
        if self.hear is not None and self._depth == 1:
            self.hear(func, args, kwargs)
        traits, given = traits_of(func), self._given(args, kwargs)
        for tensor, _ in given:
            if type(tensor) is not Tensor and is_tracked(tensor):
                operation = operation_of(func)
                if operation is not None and operation.is_composite and torch.is_grad_enabled():
                    with self:
                        return operation.run(self.tracker, func, *in_real_numbers(self.tracker, args, kwargs))
                break
        else:
            if traits.is_entered:
                with self:
                    return _entered(func)(*args, **kwargs)
        if traits.name == "__iter__":
            with self:
                return iter(torch.unbind(args[0], 0))
        if traits.name in ("sort", "argsort") and len(args) <= 3:
            # else the values of other samples decide on the order of equal ones
            named = dict(zip(("dim", "descending"), args[1:], strict=False))
            args, kwargs = args[:1], {**named, **kwargs, "stable": True}
        return self._noted(func, traits, args, kwargs, given, func(*args, **kwargs))

    def run(self, func: Any, args: Any, kwargs: Any, how: Callable[[], Any]) -> Any:
        """Run an operation in another way than by calling it, as one step: only its result gets owners."""
        with unfollowed():
            out = how()
            return self._noted(func, traits_of(func), args, kwargs, self._given(args, kwargs), out)

    def _noted(
        self, func: Any, traits: Traits, args: Any, kwargs: Any, given: list[tuple[Tensor, Owners]], out: Any
    ) -> Any:
        """Record which samples own the rows of an operation's result, and return the result."""
        kind, fresh, self._fresh = type(out), self._fresh, 0
        if kind is not Tensor:
            may_hold = isinstance(out, (Tensor, list, tuple)) and kind is not torch.Size
            if not may_hold and traits.name not in ("__setitem__", "__set__"):
                return out
            if isinstance(out, Reporting) and not (traits.in_place or "out" in kwargs or self.tracker.compares):
                return out  # tracked tensors have no owners
        if given and type(given[0][0]) is not Tensor and self._is_noted(out, args, kwargs):
            return out
        found: Any = NotImplemented
        given = given[:1] if traits.of_first else given
        if kind is Tensor and not (self.tracker.compares or "out" in kwargs):
            found = traits.quick(traits, args, kwargs, given, out, self.memo)
        if found is NotImplemented:
            with unfollowed():
                self._note_result(func, traits, args, kwargs, given, out)
        elif not args or out is not args[0]:
            self._notes[id(out)] = weakref.ref(out), self._time, found  # as note() does
            self._fresh = id(out) if traits.is_constant else 0  # its memory is new, and nothing has a view of it yet
        elif found is not given[0][1]:
            writes = traits.in_place and (id(out) != fresh or given[0][1] is not None)
            self.note(out, self._written_with(out, given[0][1], found, traits) if writes else found)
        if not self.assumed.is_empty and kind is Tensor and any(tensor in self.assumed for tensor, _ in given):
            self.assumed.check(func, traits, given, out, self.owners_of(out))
        return out

    def _is_noted(self, out: Any, args: Any, kwargs: Any) -> bool:
        """Tell whether an operation on parameters has made copies for the samples, which know their owners."""
        if kwargs or not args or not isinstance(args[0], Reporting) or isinstance(out, Reporting):
            return False
        return (note := self._notes.get(id(out))) is not None and note[0]() is out

    def _note_result(
        self, func: Any, traits: Traits, args: Any, kwargs: Any, given: list[tuple[Tensor, Owners]], out: Any
    ) -> None:
        results = [args[0]] if out is None else [out] if isinstance(out, Tensor) else tensors_in(out, {})
        if not results:
            return
        found = self._result(func, traits, args, kwargs, given, results[0] if out is None else out)
        if self.tracker.compares:
            self._note_choice(traits.name, args, kwargs, given, results)
        found = traits.mixed if found is MIXED and not (given and are_from_elsewhere(given)) else found
        each = found if isinstance(found, list) else [found] * len(results)
        if (traits.in_place and args and results[0] is args[0]) or kwargs.get("out") is not None:
            each = [self._written_with(results[0], self._noted_owners(results[0]), each[0], traits), *each[1:]]
        for tensor, one in zip(results, each, strict=False):
            if not isinstance(tensor, Reporting):
                self.note(tensor, one if fits(tensor, one) else traits.mixed)

    def _note_choice(
        self, name: str, args: Any, kwargs: Any, given: list[tuple[Tensor, Owners]], results: list[Tensor]
    ) -> None:
        """Record whether data choose the rows of results, and whether these were made of numbers, which may be data."""

        def owners_of(tensor: Tensor) -> Owners:
            return MIXED if tensor in self._of_numbers else self._noted_owners(tensor)

        if any(tensor in self.chosen for tensor, _ in given) or chooses_rows(name, args, kwargs, owners_of, self.size):
            self.chosen.add(*results)
        if all(tensor in self._of_numbers for tensor, _ in given) and (given or name in MADE_OF_NUMBERS):
            self._of_numbers.add(*results)

    def _written_with(self, tensor: Tensor, before: Owners, after: Owners, traits: Traits) -> Owners:
        """Return the owners of a tensor after an operation in place. The tensor behind it gets owners, too; other views
        of its memory become mixed if these owners may be others than before.
        """
        if may_change(tensor, before, after):
            if is_mapped(tensor):  # torch.func hides its memory, and so which views it changes
                return traits.mixed
            base, behind = base_of(tensor), cast("Owners", MIXED)
            if base is not None:
                behind = owners_behind(base, self._noted_owners(base), tensor, after, self.memo, self.size)
            self._time += 1
            self._written[memory_of(tensor)] = self._time, after.spread if isinstance(after, Mixed) else _WRITTEN
            if base is not None and not isinstance(behind, Mixed):
                self.note(base, behind)
        return after

    def _result(
        self, func: Any, traits: Traits, args: Any, kwargs: Any, given: list[tuple[Tensor, Owners]], out: Any
    ) -> Any:
        """Return the owners of a result, or of each tensor in it."""
        if traits.is_constant or not given:
            shows = shown_by(args[0]) if args and traits.name in MADE_OF_NUMBERS else None
            if shows is not None and (found := self._of_alias(shows)) is not MIXED:
                return found
            return None if traits.is_constant or traits.name in MADE_OF_NUMBERS else MIXED
        owned = [(tensor, rows) for tensor, rows in given if isinstance(rows, Rows)]
        if traits.is_aligned and isinstance(out, Tensor) and are_positions(given, out):
            return merged([(tensor.dim(), rows) for tensor, rows in owned], out.dim(), self.memo)
        has_mixed = any(isinstance(rows, Mixed) for _, rows in given)
        if has_mixed and not keeps_to_positions(traits.name, args, given, self.memo):
            # an index of unknown owners only says where the rows of others go
            entries = {*map(id, moved_entries(traits.name, args, kwargs, given) or (one for one, _ in given))}
            are_constant = all(rows is None for tensor, rows in given if id(tensor) in entries)
            for tensor, rows in given:
                if isinstance(rows, Mixed) and (id(tensor) in entries or are_constant):
                    return after_mixed(func, args, kwargs, rows, out, self.memo.shared)
        if not owned:
            return None
        if traits.handler is None and (known := operation_of(func)) is not None and known.keeps_rows:
            return owned[0][1]
        try:
            step = Step(func, args, kwargs, out, owned, self.samples(owned[0][0].device).index, self.memo)
            return owners_after(step, traits.handler, traits.axis_after)
        except (IndexError, RuntimeError, TypeError, ValueError):  # arguments given in a way that is not known here
            return MIXED

    def result(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the shape, and the owners, of what an operation would give."""
        with torch.no_grad(), unfollowed():
            out = func(*args, **kwargs)
            given = self._given(args, kwargs)
            return getattr(out, "shape", None), self._result(func, traits_of(func), args, kwargs, given, out)
