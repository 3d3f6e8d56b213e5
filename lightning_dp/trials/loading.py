"""The watch of data loading: batches are collated once more with one record exchanged, and items are read again."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.gather import Gather, is_plain
from lightning_dp.sampling.randomness import fresh_randomness
from lightning_dp.sandbox.object_kinds import GENERATORS
from lightning_dp.sandbox.randomness import generator_restorer, generators_restorer
from lightning_dp.sandbox.readings import Readings
from lightning_dp.trials.chosen_records import shape_of
from lightning_dp.trials.exchanged import Exchanged, leaves_of
from lightning_dp.trials.joined import joined_lengths, stacked_shapes, unequal_sums
from lightning_dp.trials.loss_form import EVERY
from lightning_dp.trials.reading import alike, check_reading, content_of
from lightning_dp.trials.row_order import RowOrder
from lightning_dp.trials.shifted import check_shifted

#: Containers that are copied, and their greatest length.
_FILLED, _LONGEST = (list, dict, set, deque), 4096
#: Records of a batch that are collated once more.
_FEW = 32
_CPU = torch.device("cpu")


class LoadingWatch:
    """The watch of one loading process: one batch in 16 over all workers.

    **Guarantee**: a dataset with random access whose items begin to depend on other items is refused within 16 batches
    per worker process. A batch whose collation begins to mix values of two records of equal shape is reported to the
    step, which refuses it if a gradient shows it. Not found: mixing that needs certain records, more than 32 of them,
    or records of shapes that no two share. What a collate function keeps of earlier batches is left to the regular
    checks, see ``check_collating``.

    Args:
        always: whether to exchange records also if torch's own function collates them, because hooks may mix them.
        keeps_order: whether positions say whose a record is, so that the user's function may not sort records.
    """

    def __init__(self, *, always: bool = False, keeps_order: bool = False) -> None:
        self._always, self._num_read, self._num_collated = always, -1, -1
        self._keeps_order = keeps_order

    def read(self, dataset: Any, positions: list[int]) -> None:
        """Check now and then that an item is the same whatever else is read.

        Raises:
            PrivacyError: an item changes with another one.
        """
        self._num_read += bool(positions)
        if positions and self._num_read % _period() == 0 and self._num_read and not is_plain(dataset):
            check_reading(dataset, positions[:3], streams=1)

    def collate(self, function: Callable[[list[Any]], Any], records: list[Any]) -> tuple[Any, Exchanged | None]:
        """Collate records; now and then also the first few, and these with one of them exchanged, under the same
        randomness and state.

        Returns:
            The batch, and the two small ones, if values of other records changed.
        """
        self._num_collated += 1
        if self._num_collated % _period() != 0 or not (self._always or is_own(function)):
            return function(records), None
        try:
            few = copy.deepcopy(records[:_FEW])
            before, seeds = KeptState(function), generators_restorer(_CPU)
        except Exception:  # they cannot be copied
            return function(records), None
        batch = function(records)
        after, seeds_after = KeptState(function), generators_restorer(_CPU)

        def again(chosen: list[Any]) -> Any:
            before.put_back()
            seeds()
            return function([copy.deepcopy(record) for record in chosen])

        try:
            return batch, self._exchange(again, few)
        except Exception:  # nothing that the user's own call would show
            return batch, None
        finally:
            after.put_back()
            seeds_after()

    def reading(self, function: Callable[[list[Any]], Any]) -> AbstractContextManager[Any]:
        """Return a context in which the values that the user's function reads are noted."""
        return Readings() if is_own(function) else nullcontext()

    def check(self, function: Callable[[list[Any]], Any], records: list[Any], batch: Any) -> None:
        """Check that indices of a record, which the user's function shifts, name entries of that record.

        Raises:
            PrivacyError: one names an entry of another record.
        """
        if is_own(function):
            check_shifted(records, batch)

    def unequal(
        self, function: Callable[[list[Any]], Any], records: list[Any]
    ) -> Callable[[Any], set[int | tuple[int, ...]]]:
        """Return a function that finds joined parts of records in their batch; torch's own function joins none."""
        sums = unequal_sums(records) if is_own(function) else set()
        if not sums:
            return lambda batch: set()
        stacked = stacked_shapes(records[0]) & stacked_shapes(records[-1])
        return partial(joined_lengths, sums, len(records), stacked)

    def _exchange(self, again: Callable[[list[Any]], Any], records: list[Any]) -> Exchanged | None:
        places = _alike(records)
        if places is None:
            return None
        place, source = places
        swapped = [*records[:place], records[source], *records[place + 1 :]]
        found = Exchanged(place, len(records), again(records), again(swapped))
        if found.spread() and not self._keeps_order:  # the user's function may sort the records
            order = RowOrder(again, is_followed=True)
            one, other = order.rows_of(records), order.rows_of(swapped)
            found = found if one is None or other is None else found.but(rows=(one, other))
        if not found.spread():
            return found if self._always else None
        # a call that draws from the system changes by itself
        repeated = found.but(other=again(records), rows=found.rows and (found.rows[0], found.rows[0]))
        return None if repeated.spread() else found


class KeptState:
    """The state that a collate function keeps: its attributes, closure and globals, and the attributes of its object.

    Names are bound again to the objects of now; the content of small containers and of generators is restored. NOT
    followed: tensors and arrays that are changed in place, and what other objects keep.
    """

    def __init__(self, function: Any) -> None:
        parts: list[Any] = [function]
        for part in parts:  # grows
            inner = (getattr(part, "__self__", None), getattr(part, "func", None), getattr(part, "__func__", None))
            parts += [each for each in inner if each is not None and not isinstance(each, types.ModuleType)]
        self._cells = [
            (cell, cell.cell_contents)
            for part in parts
            for cell in getattr(part, "__closure__", None) or ()
            if cell != types.CellType()
        ]
        self._names: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for part in parts:
            held, used = getattr(part, "__dict__", None), getattr(getattr(part, "__code__", None), "co_names", ())
            if isinstance(held, dict):
                self._attributes.append((held, dict(held)))
            if used:
                known = part.__globals__
                self._names.append((known, {name: known[name] for name in used if name in known}))
        values = [content for _, content in self._cells]
        values += [value for _, before in (*self._attributes, *self._names) for value in before.values()]
        self._containers = [
            (each, copy.copy(each)) for each in values if type(each) in _FILLED and len(each) <= _LONGEST
        ]
        self._generators = [generator_restorer(each) for each in values if isinstance(each, GENERATORS)]

    def put_back(self) -> None:
        """Restore the state."""
        for cell, content in self._cells:
            cell.cell_contents = content
        for held, before in self._names:
            held.update(before)
        for held, before in self._attributes:
            held.update(before)
            for name in held.keys() - before.keys():  # which may hide an attribute of the class
                del held[name]
        for container, content in self._containers:
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(content)
        for restore in self._generators:
            restore()


def is_own(function: Any) -> bool:
    """Tell whether a collate function is neither torch's own nor this package's."""
    return function is not default_collate and not isinstance(getattr(function, "__self__", None), Gather)


def check_collating(function: Any, collate: Callable[[list[Any]], Any], records: list[Any]) -> None:
    """Check that a batch does not depend on the batch that was collated before it.

    Args:
        function: the user's collate function, whose state is restored.
        collate: collates records by it.
        records: three of them.

    Raises:
        PrivacyError: a record collated after another one gave another batch.
    """
    kept = KeptState(function)

    def last_of(*chosen: Any) -> list[Any]:
        kept.put_back()
        with fresh_randomness(0):
            return [content_of(collate([copy.deepcopy(record)])) for record in chosen][-1]

    first, second, third = records
    try:
        one, other, again = last_of(first, third), last_of(second, third), last_of(first, third)
    except Exception:  # it needs more records, say
        return
    finally:
        kept.put_back()
    if alike(one, again) and not alike(one, other):
        raise PrivacyError(
            "A record was collated after another one, and its batch was another one than after a third. The collate "
            "function keeps values of earlier records (a running mean, a queue) and changes later batches by them "
            "without noise. Compute them on public data before fit, or leave them out."
        )


def _period() -> int:
    worker = get_worker_info()
    return EVERY if worker is None else max(1, EVERY // worker.num_workers)


def _alike(records: list[Any]) -> tuple[int, int] | None:
    """Return the indices of the first two records of the same shape."""
    seen: dict[Any, int] = {}
    for place, record in enumerate(records):
        shape = shape_of(record), tuple(leaf.shape for _, leaf in leaves_of(record, 0))
        if shape in seen:
            return seen[shape], place
        seen[shape] = place
    return None
