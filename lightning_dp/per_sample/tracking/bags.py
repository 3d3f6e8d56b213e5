"""Embeddings in simpler operations: bags of a fixed size, of unequal size by offsets, and named by a sparse matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import places_of
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.owners.owned import Rows

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def embedding_of_weight(
    tracker: Tracker, func: Any, weight: Any, indices: Any, padding_idx: int = -1, *options: Any, **more: Any
) -> Any:
    """Compute an embedding whose weight is the first argument."""
    return F.embedding(indices, weight, padding_idx if padding_idx >= 0 else None)


def embedding_bag(
    tracker: Tracker,
    func: Any,
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Compute the sum, mean or maximum over the rows of each sample's bag."""
    if weight.dtype == torch.long:  # the old order
        input, weight = weight, input
    if input.dim() != 2:
        return _bags_by_offsets(
            tracker,
            input,
            weight,
            offsets,
            mode,
            per_sample_weights,
            include_last_offset,
            padding_idx,
            max_norm,
            scale_grad_by_freq,
        )
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    used = None if padding_idx is None else (input != padding_idx).unsqueeze(2)
    if mode == "max":
        if used is None:
            return rows.max(1).values
        return torch.where(used.any(1), rows.masked_fill(~used, -torch.inf).max(1).values, 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(2)
    if used is not None:
        rows = torch.where(used, rows, 0.0)
    total = rows.sum(1)
    if mode == "sum":
        return total
    return total / (input.shape[1] if used is None else used.sum(1).clamp_min(1))


def _bags_by_offsets(
    tracker: Tracker,
    input: Tensor,
    weight: Any,
    offsets: Tensor,
    mode: str,
    weights: Any,
    has_last: bool,
    padding_idx: int | None,
    max_norm: float | None,
    scale_grad_by_freq: bool,
) -> Any:
    """Return bags of unequal size; an entry belongs to the sample that owns its bag."""
    follower = tracker.follower
    if follower is None:
        raise PrivacyError(
            f"Expected bags whose samples are known, got input of shape {tuple(input.shape)} with offsets. The batch "
            f"must hold the offsets, one for each sample; {WAY_OUT}."
        )
    starts = offsets[:-1] if has_last else offsets
    bags = torch.searchsorted(starts, torch.arange(len(input), device=input.device), right=True) - 1
    num, width = len(starts), weight.shape[1]
    owners = follower.owners_of(starts)
    if isinstance(owners, Rows):
        entries = owners.index[bags] if owners.axis == 0 else owners.index.expand(len(input))
        follower.note(input, Rows(0, entries))
        follower.note(bags, Rows(0, entries))
    rows = F.embedding(input, weight, padding_idx, max_norm, 2.0, scale_grad_by_freq)
    used = rows.new_ones(len(input)) if padding_idx is None else (input != padding_idx).to(rows.dtype)
    if mode == "max":
        kept = rows.masked_fill((used == 0).unsqueeze(1), -torch.inf)
        top = rows.new_full((num, width), -torch.inf).scatter_reduce(0, bags.unsqueeze(1).expand_as(rows), kept, "amax")
        return top.masked_fill(top == -torch.inf, 0.0)
    scaled = rows * used.unsqueeze(1) if weights is None else rows * (used * weights).unsqueeze(1)
    total = rows.new_zeros(num, width).index_add(0, bags, scaled)
    if mode == "sum":
        return total
    return total / rows.new_zeros(num).index_add(0, bags, used).clamp_min(1).unsqueeze(1)


def sparse_product(tracker: Tracker, func: Any, a: Any, b: Any) -> Any:
    """Multiply a sparse matrix and a parameter: add up rows of the parameter, each by the entry that names it."""
    if a.layout is torch.strided:
        return sparse_product(tracker, func, b.t(), a.t()).t()
    a = a.coalesce() if a.layout is torch.sparse_coo else a
    row, column = places_of(a)
    rows = F.embedding(column, b.reshape(len(b), -1)) * a.values()[:, None]
    return rows.new_zeros(len(a), rows.shape[1]).index_add(0, row, rows).reshape(len(a), *b.shape[1:])
