"""Indices of records that a collate function shifts, as a batch of graphs shifts the nodes of its edges.

An edge of a record names nodes 0 ... n - 1 of that record. If it names node n, it meets the first node of the next
record once both are joined, and one record changes what another one contributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.batch_reading import Path, read
from lightning_dp.trials.joined import lengths_in

_WHOLE = (torch.int32, torch.int64)


def check_shifted(records: list[Any], batch: Any) -> None:
    """Check that indices which were shifted by record name entries of their own record.

    Args:
        records: of a batch.
        batch: as the collate function made it.

    Raises:
        PrivacyError: an index of one record names an entry of another.

    Example:
        >>> pairs = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0], [1]])]
        >>> nodes = [torch.zeros(3, 5), torch.zeros(2, 5)]
        >>> joined = torch.cat([pairs[0], pairs[1] + 3], 1), torch.cat(nodes)
        >>> check_shifted([*zip(pairs, nodes)], joined)
        >>> pairs[0][0, 0] = joined[0][0, 0] = 3
        >>> check_shifted([*zip(pairs, nodes)], joined)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_dp.errors.PrivacyError: Expected indices of a record to name entries of that record, got ...
    """
    paths = [path for path, thing in read(records[0])[0] if _is_index(path, thing)] if len(records) > 1 else []
    if not paths:
        return
    shifted = [thing for _, thing in read(batch)[0] if isinstance(thing, Tensor) and thing.dtype in _WHOLE]
    for path in paths:
        parts = [part for part in (_at(record, path) for record in records) if isinstance(part, Tensor)]
        if len(parts) < len(records) or len({part.shape[:-1] for part in parts}) > 1:
            continue
        joined = torch.cat(parts, -1).detach().cpu().long()
        counts = torch.tensor([part.shape[-1] for part in parts])
        for other in [each.detach().cpu().long() for each in shifted if each.shape == joined.shape]:
            axes = zip(*[each.unsqueeze(0).flatten(0, -2) for each in (joined, other)], strict=True)
            for local, moved in axes if not torch.equal(other, joined) else ():
                _check(local, moved - local, counts, records, path)


def _check(local: Tensor, shifts: Tensor, counts: Tensor, records: list[Any], path: Path) -> None:
    """Check indices, given how far each was shifted, and the number of them in each record."""
    has_any = counts > 0
    first = (counts.cumsum(0) - counts)[has_any]
    begins = shifts[first]  # of the records that have indices
    steps = begins.diff()
    if not torch.equal(begins.repeat_interleave(counts[has_any]), shifts) or bool((steps < 0).any()):
        return  # not one shift per record
    if len(steps) and not bool(steps.any()):
        return  # the same one for all: other numbers, not other entries
    sizes = _sizes(begins, has_any, records).repeat_interleave(counts)
    if bool(((local < 0) | (local >= sizes)).any()):
        name = ".".join(map(str, path)) or "the record"
        raise PrivacyError(
            f"Expected indices of a record to name entries of that record, got {name!r} with one beyond them, which "
            "names an entry of another record once they are collated. One record would change what others contribute: "
            "correct or leave out such records before fit."
        )


def _sizes(begins: Tensor, has_any: Tensor, records: list[Any]) -> Tensor:
    """Return how many entries each record has for its indices: lengths of its parts that explain the shifts."""
    lengths = [] if bool(has_any.all()) else [lengths_in(record) for record in records]
    for path in {path: None for one in lengths for path in one}:
        sizes = torch.tensor([one.get(path, 0) for one in lengths])
        if torch.equal((sizes.cumsum(0) - sizes)[has_any], begins):
            return sizes
    most = begins.new_tensor([torch.iinfo(torch.int64).max])  # no entries follow those of the last one
    sizes = most.repeat(len(records))
    sizes[has_any] = torch.cat([begins.diff(), most])
    return sizes


def _is_index(path: Path, thing: Any) -> bool:
    if not isinstance(thing, Tensor) or thing.dtype not in _WHOLE:
        return False
    name = str(path[-1]).lower() if path else ""
    return thing.dim() == 2 or (thing.dim() == 1 and ("edge" in name or "idx" in name))


def _at(record: Any, path: Path) -> Any:
    """Return the value at a path within a record; None if the record has none."""
    for key in path:
        try:
            record = record[key]
        except (KeyError, IndexError):
            return None
        except TypeError:
            record = getattr(record, str(key), None)
    return record
