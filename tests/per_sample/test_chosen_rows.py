"""Rows that data choose: two records may show equally many rows of each sample where others have more or fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import assert_agrees, make, record
from tests.per_sample.test_owned_steps import _alone

COUNTS = [(1, 1, 2, 0, 1), (2, 2, 3, 1, 2)]
"""Chosen rows of each record, of which the first two are seen first; the next two have as many together."""


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return records and places of the chosen rows, as a loop over lists finds them."""
    counts = mask.sum(1).tolist()
    pairs = [(row, place) for row, count in enumerate(counts) for place in range(count)]
    return torch.tensor([row for row, _ in pairs]).long(), torch.tensor([place for _, place in pairs]).long()


def _flat(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    index = mask.flatten().nonzero()[:, 0]
    return h.flatten(0, 1)[index], index // mask.shape[1]


def _stacked(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows, places = _places(mask)
    chosen = [h[row, place] for row, place in zip(rows.tolist(), places.tolist(), strict=True)]
    return torch.stack(chosen) if chosen else h.new_zeros(0, 4), rows


def _by_length(h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    counts = mask.sum(1).tolist()
    order = torch.tensor(sorted(range(len(counts)), key=counts.__getitem__)).long()
    return h[order, 0], order


CHOICES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "mask": lambda h, mask: (h[mask], mask.nonzero()[:, 0]),
    "positions": lambda h, mask: (h[mask.nonzero(as_tuple=True)], torch.where(mask)[0]),
    "flat positions": _flat,
    "lists of numbers": lambda h, mask: (h[_places(mask)], _places(mask)[0]),
    "rows in a stack": _stacked,
    "repeated rows": lambda h, mask: (h[:, 0].repeat_interleave(mask.sum(1), 0), mask.nonzero()[:, 0]),
    "sorted by numbers": _by_length,
    "sorted": lambda h, mask: (h[mask.sum(1).argsort(stable=True), 0], mask.sum(1).argsort(stable=True)),
}


class Chosen(nn.Module):
    """A layer on all rows, and one on the rows that data choose."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, owners = CHOICES[self.how](self.first(batch["x"]).tanh(), batch["mask"])
        return torch.zeros(len(batch["x"])).index_add(0, owners, self.head(rows).square().sum(1))


def _batch_of(chosen: list[int], counts: tuple[int, ...]) -> dict[str, Tensor]:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < torch.tensor([counts[number] for number in chosen])[:, None]
    return {"x": x[chosen], "mask": mask}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("how", CHOICES)
def test_rows_that_data_choose_have_owners(how: str, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = Chosen(how)
    engine = make(module, module, lambda chosen: _batch_of(chosen, counts))
    for records in ([0, 1, 4], [2, 3, 0], [3, 2], [0, 3, 3]):
        expected = [_alone(module, _batch_of([number], counts)) for number in records]
        record(engine, module, _batch_of(records, counts), len(records))
        for name, grad in engine.per_sample_gradients().items():
            torch.testing.assert_close(grad, torch.stack([one[name] for one in expected]))
        engine.end()


class Experts(nn.Module):
    """Layers in one parameter: a tensor that is computed from all rows says which of them some rows have chosen."""

    def __init__(self, at: Any) -> None:
        super().__init__()
        self.at, self.experts = at, nn.Parameter(torch.randn(3, 1, 4, 3))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].flatten(0, 1)
        chosen, made = F.one_hot(x[:, 0].mul(3).long().remainder(3), 3), x.new_zeros(len(x), 4)
        for (expert,) in chosen.sum(0).gt(0).nonzero():
            rows = chosen[:, expert].nonzero()[:, 0]
            made = made.index_add(0, rows, F.linear(x[rows], self.at(self.experts, expert)))
        return made.view(len(batch["x"]), -1).square().sum(1)


@pytest.mark.parametrize("at", [lambda w, i: w[i][0], lambda w, i: w[i, i * 0]], ids=["one", "two"])
def test_a_layer_that_rows_choose_is_used_for_these_rows(at: Any) -> None:
    torch.manual_seed(0)
    module = Experts(at).double()
    assert_agrees(module, module, lambda chosen: {"x": _batch_of(chosen, (2,) * 5)["x"].double()})


def test_a_penalty_on_the_losses_of_some_samples_stays_theirs() -> None:
    module = nn.Linear(3, 1)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        counts = batch["mask"].sum(1).tolist()
        losses = [module(x).square().sum() for x in batch["x"]]
        return torch.stack([one + module.weight.sum() if n > 1 else one for one, n in zip(losses, counts, strict=True)])

    expected: list[Tensor] = []
    for number in (0, 2):
        expected += torch.autograd.grad(loss(_batch_of([number], COUNTS[0])).sum(), [module.weight])
    engine = make(module, loss, lambda chosen: _batch_of(chosen, COUNTS[0]))
    assert engine.spread_penalties()
    try:
        record(engine, loss, _batch_of([0, 2], COUNTS[0]), 2)
        torch.testing.assert_close(engine.per_sample_gradients()["weight"], torch.stack(expected))
    finally:
        engine.end()


class Ordered(nn.Module):
    """Records in an order that data choose, before a layer of which only what follows the inputs is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.layer.weight_ih_l0.requires_grad_(False)
        self.layer.bias_ih_l0.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        order = batch["mask"].sum(1).argsort(stable=True)
        losses = self.head(self.layer(batch["x"][order])[0]).square().sum((1, 2))
        return torch.zeros(len(losses)).index_add(0, order, losses)


def test_what_a_recurrent_layer_makes_of_chosen_rows_is_chosen() -> None:
    torch.manual_seed(0)
    module = Ordered()
    assert make(module, module, lambda chosen: _batch_of(chosen, (2,) * 5)).follows_owners


class Masked(nn.Module):
    """A loss over the records that data choose, in whose choice no parameter takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        losses = self.first(batch["x"][:, 0]).square().sum(1)
        return losses[batch["mask"][:, 0]].sum()


def test_a_choice_without_a_later_use_keeps_positions() -> None:
    module = Masked()
    assert not make(module, module, lambda chosen: _batch_of(chosen, COUNTS[0])).follows_owners


class Unfollowed(Chosen):
    """Rows that data choose, and an operation after them that no owners can be followed through."""

    def __init__(self) -> None:
        super().__init__("mask")
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        rows, _ = CHOICES["mask"](self.first(batch["x"]).tanh(), batch["mask"])
        return (torch.special.i0e(self.head(rows)) * self.gain).square().sum()


def test_chosen_rows_that_cannot_be_followed_are_refused() -> None:
    module = Unfollowed()
    with pytest.raises(PrivacyError, match="got rows that data choose, of which other records may have more or fewer"):
        make(module, module, lambda chosen: _batch_of(chosen, COUNTS[0]))
