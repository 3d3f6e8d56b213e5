"""Rows of embedding tables that stand for padding: no sample's gradient has another value than zero there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.nn import functional as F

from lightning_dp.per_sample.tracking.nodes import Node


class PaddingRows:
    """The rows at ``padding_idx`` of parameters of which all uses look up entries with that index.

    Uses are noted while layouts are learned, so that the answer does not depend on the records of a batch.

    Example:
        >>> import torch
        >>> rows, table = PaddingRows(), Node("table", ("table",), 0, torch.zeros(4, 2))
        >>> rows.note(F.embedding, [torch.tensor([3]), table, -1], {}, [table])
        >>> rows.found
        {'table': 3}
        >>> rows.note(F.linear, [torch.ones(1, 2), table], {}, [table])
        >>> rows.found
        {}
    """

    def __init__(self) -> None:
        self._rows: dict[str, int | None] = {}  # None where a use may reach every row

    @property
    def found(self) -> dict[str, int]:
        """The rows, by name of their parameter."""
        return {name: row for name, row in self._rows.items() if row is not None}

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], nodes: Iterable[Node]) -> None:
        """Take note of an operation.

        Args:
            func: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            nodes: parameters, and functions of parameters, among them.
        """
        index = kwargs.get("padding_idx", args[2] if len(args) > 2 else None) if func is F.embedding else None
        for node in nodes:
            row = index % node.shape[0] if isinstance(index, int) and node.is_entrywise else None
            for name in node.names:
                self._rows[name] = row if self._rows.get(name, row) == row else None
