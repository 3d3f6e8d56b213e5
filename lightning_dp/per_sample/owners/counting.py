"""Owners of rows that whole numbers in a batch seem to name: samples of rows, lengths, or positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.batch_reading import Path
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.owned import Rows


def counted(things: list[tuple[Path, Any]], size: int, memo: Memo, *, learns: bool = False) -> dict[str, Rows]:
    """Return the owners of rows that whole numbers in a batch seem to name.

    Args:
        things: in the batch.
        size: number of samples.
        memo: of the microbatch.
        learns: whether two records fill the batch in turn; the sample of each row must show that to be taken for that.
    """
    found: dict[str, Rows] = {}
    rows = {thing.shape[0] for _, thing in things if isinstance(thing, Tensor) and thing.dim()}
    for path, thing in things:
        numbers, owners = _numbers_in(thing), None
        if numbers is None or not len(numbers):
            continue
        first, last, steps, is_whole = int(numbers[0]), int(numbers[-1]), numbers.diff(), _holds_integers(thing)
        if is_whole and len(thing) == size and int(numbers.min()) >= 0 and int(numbers.sum()) in rows:  # lengths
            owners = torch.arange(size, device=numbers.device).repeat_interleave(numbers)
        elif is_whole and len(thing) == size + 1 and first == 0 and last in rows and bool((steps >= 0).all()):  # ends
            owners = torch.arange(size, device=numbers.device).repeat_interleave(steps)
        elif isinstance(thing, Tensor) and 0 <= int(numbers.min()) <= int(numbers.max()) < size:  # samples
            owners = numbers.to(torch.int64, copy=True)
            owners = owners if not learns or _is_in_turn(owners, size) else None
        if owners is not None:
            found[f"counted {path}"] = memo.hold(Rows(0, owners))
    return found


def _is_in_turn(owners: Tensor, size: int) -> bool:
    """Tell whether owners come in the order of the samples, of which every second one has equally many rows."""
    counts = owners.bincount(minlength=size)
    return bool((owners.diff() >= 0).all()) and torch.equal(counts[2:], counts[:-2])


def _numbers_in(thing: Any) -> Tensor | None:
    """Return the whole numbers of a thing: all, or those in the first of several columns, as of boxes or voxels."""
    if _holds_integers(thing):
        return torch.as_tensor(thing)
    is_table = isinstance(thing, Tensor) and thing.dim() == 2 and thing.shape[1] > 1
    if not is_table or thing.layout != torch.strided or thing.is_complex() or thing.dtype == torch.bool:
        return None
    column: Tensor = thing[:, 0]
    return column if not column.is_floating_point() or bool((column.frac() == 0).all()) else None


def _holds_integers(thing: Any) -> bool:
    if isinstance(thing, Tensor):
        return thing.dim() == 1 and thing.dtype in (torch.int32, torch.int64)
    return isinstance(thing, (list, tuple)) and all(type(one) is int for one in thing)
