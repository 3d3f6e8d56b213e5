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
        learns: whether the sample of each row must name all samples in their order to be taken for that.
    """
    found: dict[str, Rows] = {}
    rows = {thing.shape[0] for _, thing in things if isinstance(thing, Tensor) and thing.dim()}
    for path, thing in things:
        if not _holds_integers(thing) or not len(thing):
            continue
        numbers, owners = torch.as_tensor(thing), None
        first, last, steps = int(numbers[0]), int(numbers[-1]), numbers.diff()
        if len(thing) == size and int(numbers.min()) >= 0 and int(numbers.sum()) in rows:  # lengths
            owners = torch.arange(size, device=numbers.device).repeat_interleave(numbers)
        elif len(thing) == size + 1 and first == 0 and last in rows and bool((steps >= 0).all()):  # ends
            owners = torch.arange(size, device=numbers.device).repeat_interleave(steps)
        elif isinstance(thing, Tensor) and 0 <= int(numbers.min()) <= int(numbers.max()) < size:  # samples
            in_order = (first, last) == (0, size - 1) and bool(((steps == 0) | (steps == 1)).all())
            owners = numbers.to(torch.int64, copy=True) if in_order or not learns else None
        if owners is not None:
            found[f"counted {path}"] = memo.hold(Rows(0, owners))
    return found


def _holds_integers(thing: Any) -> bool:
    if isinstance(thing, Tensor):
        return thing.dim() == 1 and thing.dtype in (torch.int32, torch.int64)
    return isinstance(thing, (list, tuple)) and all(type(one) is int for one in thing)
