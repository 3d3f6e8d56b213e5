"""Functions of parameters that are written into tensors of data: at indices, masks and slices of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.checks import assert_engine_agrees
from tests.per_sample.owners import assert_agrees
from tests.per_sample.ways_of_use import Uses, _data, _loss, drawn


def _lowest(x: Tensor) -> Tensor:
    """Two columns of each record, chosen by its data."""
    return x[..., 0].argsort(1)[:, :2]


def _each(x: Tensor) -> Tensor:
    return torch.arange(len(x))[:, None]


#: What a token of 3 numbers, two rows of it or a part of it is written to, in records of 4 rows of 3 numbers.
INDICES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "mask and all": (lambda x: (x[..., 0] > 0, slice(None)), lambda m: m.token),
    "mask and the rest": (lambda x: (x[..., 0] > 0, ...), lambda m: m.token[None]),
    "mask and one column": (lambda x: (x[..., 0] > 0, 1), lambda m: m.token[:1]),
    "the rest and numbers": (lambda x: (..., torch.tensor([2, 0])), lambda m: m.token[:2]),
    "list of rows": (lambda x: (slice(None), [2, 0]), lambda m: m.rows),
    "array of rows": (lambda x: (slice(None), torch.tensor([2, 0]).numpy()), lambda m: m.token),
    "rows of each record": (lambda x: (_each(x), _lowest(x)), lambda m: m.token),
    "different rows of each record": (lambda x: (_each(x), _lowest(x)), lambda m: m.rows),
    "one row of each record": (lambda x: (_each(x)[:, 0], _lowest(x)[:, 0]), lambda m: m.token),
    "places of a mask": (lambda x: torch.where(x[..., 0] > 0), lambda m: m.rows.sum(0)),
    "numbers apart": (lambda x: (_each(x), slice(1, 3), torch.tensor([[0, 2]])), lambda m: m.rows[:, :1]),
}


@pytest.mark.parametrize("how", INDICES)
def test_parameters_at_indices_agree(how: str) -> None:
    index, value = INDICES[how]

    def written(m: Any, x: Tensor) -> Tensor:
        hidden = m.layer(x)
        hidden[index(x)] = value(m)
        return hidden.tanh()

    module = Uses(written, layer=nn.Linear(3, 3), token=drawn(3), rows=drawn(2, 3))
    names = ["layer.weight", "layer.bias", "rows" if "rows" in value.__code__.co_names else "token"]
    assert_engine_agrees(module, _loss(module), _data(4, 3), names=names)


@pytest.mark.parametrize("how", ["masked_fill", "masked_fill_", "torch", "index_put_"])
def test_parameters_by_other_names_agree(how: str) -> None:
    def written(m: Any, x: Tensor) -> Tensor:
        hidden, number, mask = m.layer(x), m.token.exp()[0], x > 0
        if how == "torch":
            return torch.masked_fill(hidden, mask, number)
        if how == "index_put_":
            return hidden.index_put_((_each(x), _lowest(x)), m.token).tanh()
        return getattr(hidden, how)(mask, number)

    module = Uses(written, layer=nn.Linear(3, 3), token=drawn(3))
    assert_engine_agrees(module, _loss(module), _data(4, 3))


class Tokens(nn.Module):
    """A token is written into two rows of each record, whose rows have owners by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.token = nn.Linear(3, 3), nn.Parameter(drawn(3))
        self.double()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        of, hidden = batch["sample_of_row"], self.layer(batch["x"])
        hidden[torch.where(batch["x"][:, 0] > 0)] = self.token
        return torch.zeros(int(of.max()) + 1, 3, dtype=hidden.dtype).index_add(0, of, hidden.tanh()).square().sum(1)


def test_parameters_at_indices_go_to_the_owners_of_rows() -> None:
    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        x = torch.cat([_data(4, 3)[i, : 2 + i % 3] for i in chosen])
        return {
            "x": x,
            "sample_of_row": torch.arange(len(chosen)).repeat_interleave(torch.tensor([2 + i % 3 for i in chosen])),
        }

    module = Tokens()
    assert assert_agrees(module, module, batch_of).follows_owners
