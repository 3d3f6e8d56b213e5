"""Records of a microbatch that count as one sample, because one user owns them.

The gradient of a user is the sum of the gradients of its records. Their rows are laid out next to each other, equally
many for every user, so that a rule sees them as the rows of one sample. Norms of users then use Gram matrices in the
same way as norms of records.

Legend: ``N`` records, ``U`` users, ``M`` most records of one user, ``K`` rows of one record.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Joining:
    """A layout that joins the rows of each user into one sample.

    Users with fewer records than others are filled up with rows of their own and backprops of zero, which add nothing
    to any gradient. If all users have equally many records, nothing is copied.

    Args:
        owners: int64, shape ``(N,)``: position 0 ... U - 1 of the user who owns each record, ascending.

    Raises:
        ValueError: the owners are not ascending positions without a gap.

    Example:
        >>> joining = Joining(torch.tensor([0, 0, 1]))
        >>> joining.num, joining.rows(1)
        (2, 2)
        >>> joining.backprops(torch.tensor([1.0, 2.0, 3.0]), 1)
        tensor([1., 2., 3., 0.])
    """

    def __init__(self, owners: Tensor) -> None:
        steps = owners.cpu().diff(prepend=torch.tensor([-1])) if len(owners) else owners
        if not bool(((steps == 0) | (steps == 1)).all()) or (len(owners) and int(owners[0]) != 0):
            raise ValueError(
                f"Expected ascending owners from 0 on without a gap, got owners={owners.tolist()}. Sort the records by "
                "user."
            )
        counts = torch.bincount(owners.cpu())
        self.num = len(counts)
        self._most = int(counts.max()) if len(counts) else 1
        self._is_even = bool((counts == self._most).all())
        firsts = (counts.cumsum(0) - counts)[:, None]
        places = torch.arange(self._most)
        self._fills = (places >= counts[:, None]).flatten()
        self._records = torch.where(places < counts[:, None], firsts + places, firsts).flatten()

    def rows(self, rows: int) -> int:
        """Return the number of rows per user, given the number ``K`` per record."""
        return rows * self._most

    def data(self, tensor: Tensor, rows: int) -> Tensor:
        """Return the rows of the records, laid out by user: ``(N * K, ...) -> (U * M * K, ...)``.

        Args:
            tensor: rows of the records, those of one record next to each other.
            rows: ``K``.
        """
        if self._is_even:
            return tensor
        return self._of_records(tensor, rows)[self._records.to(tensor.device)].flatten(0, 1)

    def backprops(self, tensor: Tensor, rows: int) -> Tensor:
        """Return the backprops of the records in the layout of :meth:`data`, padded with zeros."""
        if self._is_even:
            return tensor
        taken = self._of_records(tensor, rows)[self._records.to(tensor.device)]
        fills = self._fills.to(tensor.device).reshape(-1, *[1] * (taken.dim() - 1))
        return taken.masked_fill_(fills, 0.0).flatten(0, 1)

    @staticmethod
    def _of_records(tensor: Tensor, rows: int) -> Tensor:
        return tensor.reshape(len(tensor) // rows, rows, *tensor.shape[1:])
