"""Parameters that are repeated while owners are followed, in batches of as many samples as the parameter has copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import assert_agrees, make, record
from tests.per_sample.test_owned_steps import _alone

ROWS = [1, 2, 1, 3, 1, 1]
"""Number of rows of each record."""

WAYS: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "numbers": lambda m, x, of, size: x * m.scale.expand(3),
    "numbers in memory": lambda m, x, of, size: x * m.scale.view(1).repeat(3),
    "numbers of each row": lambda m, x, of, size: x * m.scale.expand(len(x), 3),
    "shape of a constant": lambda m, x, of, size: x * torch.broadcast_to(m.scale, (3,)),
    "matrix": lambda m, x, of, size: x @ m.row.expand(3, 3),
    "sum of a matrix": lambda m, x, of, size: x * m.row.expand(3, 3).sum(0),
    "rows": lambda m, x, of, size: x + m.row.expand(len(x), 3),
    "samples": lambda m, x, of, size: x + m.row.expand(size, 3)[of],
    "samples in memory": lambda m, x, of, size: x + m.row.repeat(size, 2).view(2 * size, 3).view(size, 6)[of, :3],
    "numbers and samples": lambda m, x, of, size: x * m.scale.expand(3) + m.scale.expand(size)[of][:, None],
}


class Repeating(nn.Module):
    """A sum over the rows of each record, with a parameter that is repeated in some way."""

    def __init__(self, way: Callable[..., Tensor]) -> None:
        super().__init__()
        self.way, self.first = way, nn.Linear(3, 3)
        self.scale, self.row = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(1, 3))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        of, size = batch["sample_of_row"], len(batch["y"])
        rows = self.way(self, self.first(batch["x"]), of, size)
        return (torch.zeros(size, 3).index_add(0, of, rows) - batch["y"]).square().sum(1)


def _batch_of(chosen: list[int], rows: list[int]) -> dict[str, Tensor]:
    records = [torch.randn(rows[i], 3, generator=torch.Generator().manual_seed(i)) for i in chosen]
    counts = torch.tensor([rows[i] for i in chosen])
    of = torch.arange(len(chosen)).repeat_interleave(counts)
    return {"x": torch.cat(records), "sample_of_row": of, "y": torch.stack([one.mean(0) for one in records])}


@pytest.mark.parametrize("way", WAYS)
def test_repeated_parameters_agree_in_batches_of_as_many_samples(way: str) -> None:
    torch.manual_seed(0)
    module = Repeating(WAYS[way])
    engine = make(module, module, lambda chosen: _batch_of(chosen, ROWS))
    assert engine.follows_owners
    for records in ([0, 1, 3], [0, 2, 4], [2], [3, 1], [3, 1, 0, 2]):
        expected = [_alone(module, _batch_of([number], ROWS)) for number in records]
        record(engine, module, _batch_of(records, ROWS), len(records))
        for name, grad in engine.per_sample_gradients().items():
            torch.testing.assert_close(grad, torch.stack([one[name] for one in expected]))
        engine.end()


def _of_all_rows(m: Any, x: Tensor, of: Tensor, size: int) -> Tensor:
    return x + m.row.expand(len(x), 3) @ torch.eye(3) * m.scale.detach()


def test_rows_of_others_do_not_take_the_copies_of_the_samples() -> None:
    """All records that were seen first have one row; later ones have others, but as many in all."""
    torch.manual_seed(0)
    rows = [1, 1, 1, 2, 1]
    module = Repeating(_of_all_rows)
    engine = make(module, module, lambda chosen: _batch_of(chosen, rows))
    engine.prefer_owners()
    batches = [_batch_of(([0, 1] * size)[:size], rows) for size in (2, 3)]

    def run(size: int) -> None:
        engine.see(batches[size - 2])
        module(batches[size - 2]).sum().backward()

    engine.learn_layout(run, sizes=(2, 3))
    assert engine.follows_owners
    batch = _batch_of([3, 0], rows)
    batch["y"] = torch.zeros(3, 3)
    with pytest.raises(PrivacyError, match="a parameter repeated for every sample to meet rows of the same samples"):
        record(engine, module, batch, 3)
    engine.end()


class Targets(nn.Module):
    """One learned token, repeated for every sample and for as many places as the largest index asks for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.token, self.layer = how, nn.Parameter(torch.randn(1, 1, 3)), nn.Linear(3, 2)
        self.double()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, places = batch
        most: Any = places.max() + 1
        token = self.token.repeat(len(x), most, 1) if self.how == "repeat" else self.token.expand(len(x), most, 3)
        chosen = token.gather(1, places[:, :, None].expand(-1, -1, 3))
        return self.layer(torch.cat([x, chosen * x], 1)).square().sum((1, 2))


@pytest.mark.parametrize("how", ["repeat", "expand"])
def test_a_size_that_a_tensor_holds_is_a_number(how: str) -> None:
    torch.manual_seed(0)
    module, data = Targets(how), torch.randn(6, 2, 3, dtype=torch.float64)
    places = torch.tensor([[0, 3]]).expand(6, 2).contiguous()
    assert not assert_agrees(module, module, lambda chosen: (data[chosen], places[chosen])).follows_owners


class Tables(nn.Module):
    """A row of learned functions for each record, as positions that are stretched to each picture's size."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.places, self.layer = how, nn.Parameter(torch.randn(1, 2, 3)), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        own = torch.cat([self.places[:, : 1 + int(one > 0)].mean(1, keepdim=True) for one in x[:, 0, 0]])
        met = torch.cat([x, own], 1) * x[:, :1] if self.how == "cat" else x * own
        return self.layer(met).square().sum((1, 2))


@pytest.mark.parametrize("how", ["cat", "mul"])
def test_functions_for_each_row_go_to_the_samples_of_these(how: str) -> None:
    torch.manual_seed(0)
    module, data = Tables(how), torch.randn(6, 2, 3, dtype=torch.float64)
    assert assert_agrees(module, module, lambda chosen: data[chosen]).follows_owners


class Pooled(nn.Module):
    """A learned query for each of two rows of a record, which all records share, meets that row in a product."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.query, self.layer = how, nn.Parameter(torch.randn(3)), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        query = self.layer(self.query.expand(len(rows), 3))
        if self.how == "einsum":
            met = torch.einsum("rd,rtd->rt", query, self.layer(rows))
        else:
            met = torch.bmm(query[:, None], self.layer(rows).transpose(1, 2)).squeeze(1)
        return met.softmax(1).square().view(len(x), -1).sum(1)


@pytest.mark.parametrize("how", ["einsum", "bmm"])
def test_queries_for_each_row_go_to_the_samples_of_these(how: str) -> None:
    torch.manual_seed(0)
    module, data = Pooled(how), torch.randn(6, 2, 4, 3, dtype=torch.float64)
    assert assert_agrees(module, module, lambda chosen: data[chosen]).follows_owners
