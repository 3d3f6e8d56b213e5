"""Tensors whose rows are assumed to be samples, and tensors that show the entries of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import TensorSet, memory_of, unfollowed
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.owners.owned import Mixed, Owners

if TYPE_CHECKING:
    from lightning_dp.per_sample.owners.traits import Traits


class Assumed(TensorSet):
    """Tensors that hold a parameter repeated for every sample, as their length says."""

    def check(self, func: Any, traits: Traits, given: list[tuple[Tensor, Owners]], out: Tensor, owners: Owners) -> None:
        """Refuse one of them that meets rows of other owners entry by entry; add the result of any other operation."""
        if not isinstance(owners, Mixed):
            self.add(out)
        elif traits.is_aligned and not any(isinstance(rows, Mixed) for _, rows in given):
            raise PrivacyError(
                f"Expected a parameter repeated for every sample to meet rows of the same samples, got {func.__name__} "
                f"with rows of others, of which there are as many. Repeat it for the rows of each sample; {WAY_OUT}."
            )


def alias_among(tensor: Tensor, others: Iterable[Tensor | None]) -> Tensor | None:
    """Return one of some tensors that shows the same entries in the same memory; None if there is none.

    ``torch.Tensor(x)`` and ``torch.from_numpy(x.numpy())`` give such a tensor, and report nothing.

    Example:
        >>> x = torch.rand(3)
        >>> alias_among(torch.Tensor(x), [torch.rand(3), x]) is x, alias_among(x[:2], [x]) is None
        (True, True)
    """

    def layout(one: Tensor) -> tuple[Any, ...]:
        return memory_of(one), one.storage_offset(), one.shape, one.stride(), one.dtype

    with unfollowed():
        if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel() or memory_of(tensor) == -1:
            return None
        mine = layout(tensor)
        for one in others:
            if one is not None and memory_of(one) == mine[0] and layout(one) == mine:
                return one
    return None
