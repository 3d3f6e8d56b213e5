"""The rule for ``nn.Embedding``: norms from the summed backprops of equal tokens, without a dense ``(B, V, d)`` tensor.

Legend: ``B`` samples, ``T`` tokens of a sample (positions, calls and rows together), ``V`` entries, ``d`` features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.rules.base import Call, Rule, squared_norm, widen


class EmbeddingRule(Rule):
    """The rule for ``nn.Embedding``; the entry at ``padding_idx`` gets no gradient."""

    @override
    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        return True

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        if "weight" not in names:
            return {}
        assert isinstance(module, nn.Embedding)
        tokens, backprops = _tokens(module, calls, batch_size)
        grads = backprops.new_zeros(batch_size * module.num_embeddings, module.embedding_dim)
        offsets = torch.arange(batch_size, device=tokens.device).unsqueeze(1) * module.num_embeddings
        grads.index_add_(0, (tokens + offsets).flatten(), backprops.flatten(0, 1))
        return {"weight": grads.view(batch_size, module.num_embeddings, module.embedding_dim)}

    @override
    def squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        if "weight" not in names:
            return {}
        assert isinstance(module, nn.Embedding)
        tokens, backprops = _tokens(module, calls, batch_size)
        if tokens.shape[1] <= 1:
            return {"weight": squared_norm(backprops)}
        return {"weight": _squared_norms(_equal_token_sums(tokens, backprops))}

    @override
    def masked_squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: Mapping[str, ParameterMask]
    ) -> dict[str, Tensor]:
        if "weight" not in masks:
            return {}
        assert isinstance(module, nn.Embedding)
        rows = _equal_token_sums(*_tokens(module, calls, batch_size))
        active = torch.index_select(masks["weight"].active, 0, rows.entries.flatten()).view_as(rows.sums)
        rows.sums.mul_(active)
        return {"weight": _squared_norms(rows)}

    @override
    def add_weighted_sum(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
    ) -> None:
        if "weight" not in out:
            return
        assert isinstance(module, nn.Embedding)
        tokens, backprops = _tokens(module, calls, batch_size)
        scaled = (backprops * factors.to(backprops.dtype).reshape(-1, 1, 1)).flatten(0, 1)
        # one row of the sum for every row used: no tensor of the size of the vocabulary
        out["weight"].index_add_(0, tokens.flatten(), scaled.to(out["weight"].dtype))

    @override
    def materialises(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        return False


class _Rows(NamedTuple):
    """The rows of every sample's gradient that may be nonzero; unused places hold zeros.

    Args:
        entries: index of each row in the gradient, ``(B, T)``.
        sums: values of the rows, ``(B, T, d)``.
        lengths: sum of the lengths of the backprops in each row, ``(B, T)``.
        counts: number of backprops in each row, ``(B, T)``.
    """

    entries: Tensor
    sums: Tensor
    lengths: Tensor
    counts: Tensor


def _equal_token_sums(tokens: Tensor, backprops: Tensor) -> _Rows:
    """Sum, within each sample, the backprops of equal tokens into one row per distinct token."""
    size, num_tokens = tokens.shape
    # tokens sorted in each sample; a run of equal ones is one row of the gradient
    ordered, order = tokens.sort(dim=1)
    starts = torch.zeros_like(ordered)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = starts.cumsum(1)
    entries = torch.zeros_like(runs).scatter_(1, runs, ordered)
    rows = torch.empty_like(runs).scatter_(1, order, runs)
    norms = torch.linalg.vector_norm(backprops, dim=2)
    lengths = torch.zeros_like(norms).scatter_add_(1, rows, norms)
    counts = torch.zeros_like(norms).scatter_add_(1, rows, torch.ones_like(norms))
    rows += torch.arange(size, device=rows.device).unsqueeze(1) * num_tokens
    sums = torch.zeros_like(backprops).flatten(0, 1)
    sums.index_add_(0, rows.flatten(), backprops.flatten(0, 1))
    return _Rows(entries, sums.view_as(backprops), lengths, counts)


def _squared_norms(rows: _Rows) -> Tensor:
    """Return the squared norm of every sample, including a bound on the rounding of the weighted sum.

    The weighted sum adds the backprops of equal tokens one after the other, so the bound uses their actual number, also
    above the limit in ``rounding.py``. A row of one token is added unchanged.
    """
    eps = torch.finfo(rows.lengths.dtype).eps
    errors = torch.where(rows.counts > 1, (rows.counts + 4) * eps * rows.lengths, 0.0)
    return (squared_norm(rows.sums).sqrt() + squared_norm(errors).sqrt()).square()


def _tokens(module: nn.Embedding, calls: Sequence[Call], batch_size: int) -> tuple[Tensor, Tensor]:
    """Return tokens ``(B, T)`` and backprops ``(B, T, d)``; the backprops of padding tokens are zero."""
    size = module.embedding_dim
    if batch_size == 0:
        backprop = widen(calls[0].backprop)
        return torch.zeros(0, 1, dtype=torch.long, device=backprop.device), backprop.new_zeros(0, 1, size)
    tokens = torch.cat([call.activation.reshape(batch_size, -1) for call in calls], dim=1).long()
    backprops = [call.backprop.reshape(batch_size, -1, size) for call in calls]
    joined = widen(backprops[0] if len(backprops) == 1 else torch.cat(backprops, dim=1))
    if module.padding_idx is not None:
        joined = torch.where((tokens == module.padding_idx).unsqueeze(2), joined.new_zeros(()), joined)
    return tokens, joined
