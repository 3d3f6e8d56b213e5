"""Tensors whose rows are assumed to be samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import TensorSet
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
