"""The loss of each record by itself, from a batch whose loss shares a denominator.

A mean over the tokens of a batch divides the loss of every record by a count that all records share. While the user's
step runs, a reduction to a scalar is done for each record by itself, and what is then computed with the scalar too:

    loss = sum(l) / count   becomes   loss = mean_i( sum(l_i) / count_i )

so that the gradient of the loss of a batch is the mean of those of its records alone. A record whose loss is not
finite counts as 0, so that user code that asks for finite losses sees what the other records have. A mean over no rows
of a record is 0: no gradient flows through it alone either, and other terms of its loss count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import memory_of, unfollowed
from lightning_dp.per_sample.owners.choices import chooses_by_others
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.loss_kinds import (
    BY_VALUES,
    EXTREMES,
    IN_PLACE,
    defaults_of,
    is_over_all_axes,
    kind_of,
    weights_of,
)
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Rows
from lightning_dp.per_sample.owners.places import Places, PlacesOf, of_records
from lightning_dp.per_sample.owners.telling import Telling
from lightning_dp.per_sample.owners.traits import SHOWS_NO_ENTRY
from lightning_dp.per_sample.tracking.arguments import tensors_in
from lightning_dp.per_sample.tracking.nodes import is_tracked


class OwnLosses(Telling):
    """A mode in which reductions to a scalar are done for each record by itself.

    Rows belong to records by position, row r of N to record ``r // (N / B)``, or, in a step that follows their owners,
    to these: ``loss[mask].mean()`` is the mean of what the mask leaves of each record. If owners are followed, losses
    that other records have a part in are refused: by values of theirs, or by a selection that they make.

    **Guarantee**: none by itself. What is computed in another way (``.item()``, rows in another order) stays
    the loss of the batch; a comparison with records run alone must show that this does not happen.

    Args:
        size: records of the batch, B.
        reduction: "mean" or "sum": how the losses of the records are combined.
        constants: parameters and buffers of the module, which hold no records.
        owners: returns the mode that follows the owners of rows, or None.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> with OwnLosses(2, "mean", []):
        ...     loss = (losses * mask).sum() / mask.sum()
        >>> loss  # of 2.0 and 5.0; all in one it is 9 / 3
        tensor(3.5000)
    """

    def __init__(
        self,
        size: int,
        reduction: str,
        constants: Iterable[Tensor],
        owners: Callable[[], Follower | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._size, self._sums, self._owners = size, reduction == "sum", owners
        self._places = PlacesOf(size, constants, owners)
        self._rows: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._found: dict[int, Tensor] = {}  # memory -> positions of values; held, so that it stays theirs
        self.figures: list[tuple[Hashable, Tensor]] = []
        """Values of no record that losses of records were computed with, each with a key; they may follow the batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHOWS_NO_ENTRY:
            with unfollowed():  # of no interest to the mode that follows owners
                return func(*args, **kwargs) if kwargs else func(*args)
        kwargs, kind = kwargs or {}, kind_of(func)
        if func is torch.where and len(args) + len(kwargs) == 1:  # as nonzero
            kind = "selection"
        if self.hear is not None and self._depth == 1:
            self.hear(func, args, kwargs)
        rows: Tensor | None = None
        if kind is None or (kind == "scalar" and not (self._rows and self._knows_one(args, kwargs))):
            return func(*args, **kwargs)
        if kind == "loss":
            rows = self._of_loss(func, args, kwargs)
        elif kind == "reduction":
            if args and is_over_all_axes(func.__name__, args[0], args[1:], kwargs):
                rows = self._of_reduction(func, args[0], {key: kwargs[key] for key in kwargs.keys() & {"dtype"}})
        elif kind == "stack":
            if self._rows and len(args) == 1 and not kwargs:
                rows = self._of_stack(args[0])
        elif kind == "selection":
            out = func(*args, **kwargs)
            with unfollowed():
                self._check_selection(func.__name__, args, kwargs, out)
            return out
        else:
            return self._of_scalars(func, args, kwargs)
        return func(*args, **kwargs) if rows is None else self._joined(rows, func, args, kwargs)

    def _known(self, tensor: Tensor) -> Tensor | None:
        """Return what a tensor is for each record, shape (B, *shape), if it was computed from values of records."""
        found = self._rows.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _knows_one(self, args: Any, kwargs: Any) -> bool:
        """Tell whether one of the arguments, of which none is a list, was computed from values of records."""
        for one in (*args, *kwargs.values()) if kwargs else args:
            if id(one) in self._rows and self._known(one) is not None:
                return True
        return False

    def _joined(self, rows: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return the scalar of the batch, and note what it is for each record."""
        name = getattr(func, "__name__", "")
        if rows.is_floating_point() and (rows.requires_grad or name not in EXTREMES):
            with unfollowed():
                value = self._combined(rows)
            if (follower := self._owners()) is not None:
                follower.note(value, Mixed(name))
        else:  # a count: no gradient flows through it
            value = func(*args, **kwargs)
        self._rows[id(value)] = (weakref.ref(value), rows)
        return value

    def _combined(self, rows: Tensor) -> Tensor:
        """Return the sum or mean of the records' values; one that is not finite counts as 0, as its gradient does."""
        finite = torch.where(rows.isfinite(), rows, 0.0)
        return finite.sum(0) if self._sums else finite.mean(0)

    def _check_unmixed(self, func: Any, tensor: Any) -> None:
        """Refuse a loss of rows that are known to mix records: it is not made of losses of the records."""
        follower = self._owners()
        if follower is not None and isinstance(tensor, Tensor) and tensor.requires_grad and not is_tracked(tensor):
            owners = follower.owners_of(tensor)
            if isinstance(owners, Mixed):
                raise _unknown(f"{func.__name__} of rows after {owners.by}, which mixes records")

    def _meet(self, func: Any, tensor: Tensor) -> None:
        """Take note of a value of no record that meets the losses of records; refuse one that records have mixed."""
        if self._known(tensor) is not None or is_tracked(tensor) or self._places(tensor) is not None:
            return
        with unfollowed():
            owners = None if (follower := self._owners()) is None else follower.owners_of(tensor)
            if owners is not None and owners is not MIXED and self._size > 1:  # else it was made outside of the step
                raise _unknown(f"{func.__name__} with a value that other records have a part in")
            if not self._places.is_constant(tensor):
                self.figures.append((("own loss", func.__name__), tensor))

    def _of_reduction(self, func: Any, tensor: Any, kwargs: Any) -> Tensor | None:
        known = self._known(tensor) if isinstance(tensor, Tensor) else None
        places = self._places(tensor) if known is None else Places(self._size, self._size)
        if places is None:
            self._check_unmixed(func, tensor)
            return None
        return places.reduced(func, tensor if known is None else known, kwargs)

    def _of_stack(self, tensors: Any) -> Tensor | None:
        rows = [self._known(one) for one in tensors]
        known = [one for one in rows if one is not None]
        return torch.stack(known, 1) if len(known) == len(rows) else None

    def _of_loss(self, func: Any, args: Any, kwargs: Any) -> Any:
        defaults = defaults_of(func)
        options = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        reduction = options["reduction"]
        if reduction not in ("mean", "sum", "batchmean") or options.get("reduce") is not None:
            return None
        losses: Tensor = func(**{**options, "reduction": "none"})
        places = self._places(losses)
        if places is None:
            self._check_unmixed(func, losses)
            return None
        total = places.sums(losses)
        if reduction == "sum":
            return total
        if reduction == "batchmean":
            return total / places.counts
        if "ignore_index" in options and not options["target"].is_floating_point():
            weights, counted = weights_of(options)
            return total / (places.sums(weights).to(total.dtype) + (places.sums(counted) == 0))
        return total / (places.counts * (losses.numel() // max(1, len(losses))))

    def _of_scalars(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on scalars of records: on scalars for each record, on rows for the rows of each."""
        in_place = func.__name__ in IN_PLACE
        for one in tensors_in(args[in_place:], kwargs):
            self._meet(func, one)
        if in_place and self._known(args[0]) is None:  # a sum of the user's own, such as one over batches: it stays one
            rows = getattr(args[0].clone(), func.__name__.removesuffix("_"))(self._row(args[1], ()), **kwargs)
            value = func(*args, **kwargs)
            if not value.dim():
                self._rows[id(value)] = (weakref.ref(value), rows)
            return value
        plain = [one for one in tensors_in(args, kwargs) if self._known(one) is None and one.dim()]
        places = [self._places(one) for one in plain]
        if not any(places):
            num_axes = max(one.dim() for one in tensors_in(args, kwargs))
            rows = func(*[self._values(one, num_axes) for one in args], **kwargs)
            if not (in_place and rows.is_floating_point()):
                return self._joined(rows, func, args, kwargs)
            value = args[0].copy_(self._combined(rows))
            self._rows[id(value)] = (weakref.ref(value), rows)
            return value
        alike = all(one is not None and one.are_those_of(places[0]) for one in places)
        if not alike or any(one.dim() for one in tensors_in(args, kwargs) if self._known(one) is not None):
            return func(*args, **kwargs)
        shape = (len(plain[0]), *[1] * (max(one.dim() for one in plain) - 1))
        return func(*[self._row(one, shape, places[0]) for one in args], **kwargs)

    def _values(self, one: Any, num_axes: int) -> Any:
        """Return what an argument is for each record, with that many axes after the first one."""
        rows = self._known(one) if isinstance(one, Tensor) else None
        if rows is None:
            return one
        with unfollowed():
            values = rows.clone().reshape(self._size, *[1] * (num_axes - one.dim()), *one.shape)
            return of_records(values, self._owners())

    def _row(self, one: Any, shape: tuple[int, ...], places: Places | None = None) -> Any:
        rows = self._known(one) if isinstance(one, Tensor) else None
        if rows is None:
            return one
        return rows.clone() if places is None else places.spread(rows).reshape(shape)

    def _check_selection(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Refuse a selection among the rows of a record by values of others, or by values if nothing tells whose rows
        through which a gradient flows are.
        """
        if not (args and isinstance(args[0], Tensor)) or is_tracked(args[0]):
            return
        follower = self._owners()
        index = args[1] if name == "__getitem__" else ()
        chosen = index if isinstance(index, tuple) else (index,)
        if follower is not None and self._size > 1:
            owners = follower.owners_of(out) if isinstance(out, Tensor) and out.dim() else None
            is_list = not (name == "__getitem__" and isinstance(chosen[0], (int, slice)))
            if isinstance(owners, Rows) and owners.axis is None and is_list:  # a single row: its axis may have more
                data = follower.owners_of(args[0])
                if isinstance(data, Rows) and data.axis == 0:
                    follower.note(out, Rows(0, owners.index.expand(len(out))))
            if chooses_by_others(name, args, kwargs, out, follower.owners_of):
                raise _unknown(f"{name} by values of others")
        by_mask = any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) and one.dim() for one in chosen
        )
        by_values = args[0].requires_grad and (name in BY_VALUES or by_mask)
        if follower is None and self._size > 1:
            if name in BY_VALUES or name == "where":
                self._found |= {memory_of(one): one for one in tensors_in((out,), {})}
            by_values |= args[0].requires_grad and self._is_by_positions(args[0], tensors_in(args[1:], kwargs), out)
        if by_values and (follower is None or isinstance(follower.owners_of(out), Mixed)):
            raise _unknown(f"{name} by values")

    def _is_by_positions(self, data: Tensor, indices: list[Tensor], out: Any) -> bool:
        """Tell whether indices select by positions at which values were found, or other rows than each record has."""
        if any(one.numel() and memory_of(one) in self._found for one in indices):
            return True
        unequal = isinstance(out, Tensor) and out.dim() > 0 and len(out) % self._size > 0
        return unequal and bool(indices) and len(data) % self._size == 0


def _unknown(what: str) -> PrivacyError:
    return PrivacyError(
        f"Expected rows whose records are known by their positions under per_sample_loss=True, got {what}. Multiply by "
        "a mask instead, or pass grad_sample='single'."
    )
