"""Owners of rows through operations, as a function of parameters and rows says it, against batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.owners import assert_agrees
from tests.per_sample.test_following import bags_of, summed
from tests.per_sample.ways_of_use import Uses, drawn


def by_experts(m: Any, x: Tensor) -> Tensor:
    """Each row by the matrix of the expert that its first entry chooses, as products in groups."""
    rows = x.flatten(0, 1).float()
    chosen, order = (rows[:, 0] > 0).long().sort()
    ends = chosen.bincount(minlength=3).cumsum(0).int()
    matrices = m.w.float().mT if m.turned else m.w.float()
    return torch._grouped_mm(rows[order], matrices, offs=ends)[order.argsort()].view(len(x), 16)


def sized_by_tensors(m: Any, x: Any) -> Tensor:
    none = (x > 9).long().sum()
    wide: Tensor = x[:, :1].expand(-1, none + 3, -1).narrow(1, none, 2)
    return wide * m.w


def written_into_zeros(m: Any, x: Tensor) -> Tensor:
    """The rows in memory that held constants before, times a parameter."""
    made = torch.zeros_like(x)
    made[torch.arange(len(x))] = x
    return made * m.w


def written_through_views(m: Any, x: Tensor) -> Tensor:
    """Parts of rows that are copied to new memory, of which one part is cleared, times a parameter."""
    made = x.new_empty(x.shape)
    made[..., :1].copy_(x[..., 1:2])
    made[..., 1:].copy_(x[..., :2])
    made[:, 0].zero_()
    return made * m.w


def written_one_by_one(m: Any, x: Tensor) -> Tensor:
    """Rows that are added to zeros through a view of one row each, times a parameter."""
    made = torch.zeros_like(x)
    for row in range(len(x)):
        made[row].add_(x[row])
    return made * m.w


def added_by_experts(m: Any, x: Tensor) -> Tensor:
    """Each row by the two experts that it chooses, added up where its number stands, as mixtures of experts have it."""
    rows, out = x[:, 0], torch.zeros_like(x[:, 0])
    weight, chosen = (rows @ m.gate).softmax(-1).topk(2, -1)
    for number in range(len(m.w)):
        row, place = torch.where(chosen == number)
        out[row] += weight[row, place, None] * (rows[row] @ m.w[number])
    return out @ m.w[0]


def at_positions(m: Any, x: Tensor) -> Tensor:
    """Entries that are chosen by their values, each with a parameter of its place, added up row by row."""
    row, place = (x[:, :, 0] > 0).nonzero().unbind(1)
    return torch.zeros_like(x[:, 0]).index_add(0, row, m.w[place].unsqueeze(1) * x[row, place])


def with_types(m: Any, x: Tensor) -> Tensor:
    """The rows, and the embedding of a type that all of them have."""
    return x * F.embedding(torch.ones(x.shape[:2], dtype=torch.long), m.w)


# what a network may do with the rows of all bags, shape (R, 4, 3)
WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "product of two functions of parameters": (
        lambda m, x: x @ (m.a.tanh() @ m.b.tanh()),
        {"a": drawn(3, 2), "b": drawn(2, 3)},
    ),
    "products in stacks": (lambda m, x: x.unsqueeze(1) @ (m.w.exp() @ m.w.mT), {"w": drawn(2, 3, 3)}),
    "products of all experts, viewed": (
        lambda m, x: torch.bmm(x.flatten(0, 1).repeat(2, 1).view(2, -1, 3), m.w).view(-1, 3).view(2, -1, 4, 3).sum(0),
        {"w": drawn(2, 3, 3)},
    ),
    "pooled parameters": (lambda m, x: x @ F.max_pool1d(m.w, 2), {"w": drawn(3, 4)}),
    "pooled rows": (
        lambda m, x: F.adaptive_max_pool1d(F.max_pool1d(x * m.w, 2, return_indices=True)[0], 1),
        {"w": drawn(3)},
    ),
    "unpooled rows": (
        lambda m, x: F.max_unpool1d(*F.max_pool1d(x.mT, 2, return_indices=True), 2) * m.w,
        {"w": drawn(4)},
    ),
    "times in front": (
        lambda m, x: m.layer(x.transpose(0, 1).reshape(-1, 3)).view(4, -1, 3).transpose(0, 1),
        {"layer": nn.Linear(3, 3)},
    ),
    "attention over positions": (
        lambda m, x: m.layer(x, x, x, need_weights=False)[0],
        {"layer": nn.MultiheadAttention(3, 1, batch_first=True)},
    ),
    "spectra": (
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.w), n=4, dim=1),
        {"w": drawn(3, 3, 2)},
    ),
    "one-hot rows": (lambda m, x: F.one_hot((x[:, 0] > 0).long(), 2).double() @ m.w * x[:, :1], {"w": drawn(2, 3)}),
    "stacks of products": (lambda m, x: torch.baddbmm(x, x, x[:, :3]) @ m.w, {"w": drawn(3, 2)}),
    "solved systems": (
        lambda m, x: torch.linalg.solve_triangular(x[:, :3].exp(), torch.linalg.inv(x[:, 1:]) @ m.w, upper=True),
        {"w": drawn(3, 2)},
    ),
    "padded rows": (lambda m, x: F.pad(x, (0, 0, 0, 1, 0, 0)) * m.w, {"w": drawn(3)}),
    "interpolated rows": (lambda m, x: F.interpolate(x, scale_factor=2.0, mode="linear") * m.w, {"w": drawn(6)}),
    "angles": (lambda m, x: torch.polar(x.abs(), x.atan()).angle() * m.w, {"w": drawn(3)}),
    "distances": (lambda m, x: torch.cdist(x[:, 0], m.w), {"w": drawn(5, 3)}),
    "one-hot rows by a scatter": (
        lambda m, x: torch.zeros(len(x), 2).double().scatter_(1, (x[:, 0, :1] > 0).long(), 1.0) @ m.w * x[:, 0, :1],
        {"w": drawn(2, 3)},
    ),
    "sums within rows": (
        lambda m, x: torch.zeros_like(x).scatter_add(1, (x > 0).long(), x * m.w) * m.w,
        {"w": drawn(3)},
    ),
    "distances to rows": (lambda m, x: torch.cdist(m.w, x[:, 0]).mT, {"w": drawn(5, 3)}),
    "constants of the type of rows": (lambda m, x: x * torch.linspace(1, 2, 3).to(x) * m.w, {"w": drawn(3)}),
    "sums with an ellipsis": (
        lambda m, x: torch.einsum("...k,...k->...", (x * m.w).transpose(0, 1), x.transpose(0, 1)).mT @ m.a,
        {"w": drawn(3), "a": drawn(4, 2)},
    ),
    "cosines": (lambda m, x: F.cosine_similarity(x[:, :1], m.w[None], dim=-1), {"w": drawn(5, 3)}),
    "cross products": (
        lambda m, x: (torch.linalg.cross(x, x.square() * m.w) + torch.cross(x, x.sin(), dim=2)) * m.w,
        {"w": drawn(3)},
    ),
    "distances of pairs": (
        lambda m, x: (F.pairwise_distance(x, 2 * x) + torch.linalg.vecdot(x[:, :1].mT, x[:, 1:2].mT, dim=1)) @ m.w,
        {"w": drawn(4, 2)},
    ),
    "put where a mask says": (
        lambda m, x: x.masked_scatter(x > 0, x.exp()[x > 0] + 1) * m.w,
        {"w": drawn(3)},
    ),
    "constants put where a mask says": (
        lambda m, x: torch.zeros_like(x).masked_scatter(x[:, :, :1] > 0, torch.ones(x.numel()).double()) * m.w,
        {"w": drawn(3)},
    ),
    "spectra of pictures": (
        lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * m.w, s=(4, 3)) * m.w,
        {"w": drawn(1)},
    ),
    "sampled from pictures": (
        lambda m, x: F.grid_sample(x[:, None], x[:, None, :, :2].tanh(), align_corners=False)[:, 0, 0] @ m.w,
        {"w": drawn(4, 2)},
    ),
    "turned pictures": (
        lambda m, x: F.affine_grid(x[:, :2], [len(x), 1, 2, 2], align_corners=False).flatten(1) @ m.w,
        {"w": drawn(8, 2)},
    ),
    "entries by two indices": (
        lambda m, x: m.w[(x[:, 0, 0] > 0).long(), (x[:, 1, 0] > 0).long() - 1] * x[:, 0, 0],
        {"w": drawn(2, 2)},
    ),
    "products in groups": (by_experts, {"w": drawn(3, 4, 4), "turned": True}),
    "products in groups, each by itself": (by_experts, {"w": drawn(3, 4, 4), "turned": False}),
    "experts that rows choose": (added_by_experts, {"w": drawn(4, 3, 3), "gate": drawn(3, 4)}),
    "positions that are not zero": (at_positions, {"w": drawn(4)}),
    "type of all rows": (with_types, {"w": drawn(2, 3)}),
    "added within rows": (
        lambda m, x: (
            torch.zeros_like(x).scatter_add(1, (x > 0).long() + 1, x).scatter_(2, (x[:, :, :1] > 1).long(), x) * m.w
        ),
        {"w": drawn(3)},
    ),
    "written into zeros": (written_into_zeros, {"w": drawn(3)}),
    "written through views": (written_through_views, {"w": drawn(3)}),
    "written one by one": (written_one_by_one, {"w": drawn(3)}),
    "windows by strides": (lambda m, x: x.as_strided((len(x), 3, 2, 3), (12, 3, 3, 1)) * m.w, {"w": drawn(3)}),
    "joined to nothing": (lambda m, x: torch.cat([torch.tensor([]).double(), x], 1) * m.w, {"w": drawn(3)}),
    "numbers": (lambda m, x: x * torch.tensor([1.0, 2.0, 3.0]).double() * m.w + torch.as_tensor(2.0), {"w": drawn(3)}),
    "sizes that tensors give": (sized_by_tensors, {"w": drawn(3)}),
    "arguments by keyword": (
        lambda m, x: F.linear(input=torch.transpose(input=x, dim0=1, dim1=2), weight=m.w) @ m.a,
        {"w": drawn(2, 4), "a": drawn(2, 2)},
    ),
    "entries that a constructor shows": (lambda m, x: torch.Tensor(x) * m.w, {"w": drawn(3)}),
    "entries that numpy shows": (lambda m, x: torch.from_numpy(x.numpy()) * m.w, {"w": drawn(3)}),
    "type of the rows": (lambda m, x: x * m.w.float().to(x) * m.w.type_as(x), {"w": drawn(3)}),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.one_in(2)
def test_operations_on_owned_rows_agree_with_batches_of_one(way: str) -> None:
    torch.manual_seed(0)
    function, held = WAYS[way]
    module, bags = Uses(function, **held), bags_of(4, 4 if "groups" in way else 3)

    def loss(batch: list[Tensor]) -> Tensor:
        return summed(module(torch.cat(batch)), batch)

    rtol = 1e-6 if way == "type of the rows" or "groups" in way else 1e-9  # they compute in float32
    engine = assert_agrees(module, loss, lambda chosen: [bags[i] for i in chosen], rtol=rtol)
    assert engine.follows_owners
