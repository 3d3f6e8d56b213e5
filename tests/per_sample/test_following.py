"""Owners of rows through operations: what agrees with batches of one, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.following import Follower
from lightning_dp.per_sample.owned import MIXED, Mixed, Rows
from lightning_dp.per_sample.tracker import Tracker
from lightning_dp.per_sample.traits import SHOWS_NO_ENTRY
from lightning_dp.per_sample.uses import Recorder
from tests.per_sample.checks import make_engine, run_batch
from tests.per_sample.test_owners import GCN, _collate_graphs, _features, _graph, assert_agrees, make
from tests.per_sample.test_tracker import Uses, drawn

LENGTHS = torch.tensor([2, 5, 1, 4, 5, 3])


def bags_of(*shape: int) -> list[Tensor]:
    """Records with 1, 3, 5, 7 rows: positions do not tell their owners."""
    return [_features(1 + 2 * i, *shape, seed=i) for i in range(4)]


def summed(rows: Tensor, bags: list[Tensor]) -> Tensor:
    """The losses of the bags, from one row for each of their rows."""
    return torch.stack([one.square().sum() for one in rows.split([len(bag) for bag in bags])])


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


def test_functions_that_are_not_followed_return_no_entries() -> None:
    x = torch.tensor([[3.5, 7.25]])
    for function in SHOWS_NO_ENTRY:
        shown = function(x)
        assert type(shown) in (bool, int, torch.Size, tuple, torch.dtype, torch.device, torch.layout)
        assert not {3, 7} & set(shown if isinstance(shown, tuple) else (shown,))


def test_distances_have_the_owners_of_both_kinds_of_rows() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    owners, rows, fixed = torch.tensor([0, 0, 1]), _features(3, 2), torch.ones(3, 2).double()
    follower.note(rows, Rows(0, owners))
    follower.note(fixed, None)
    with follower:
        made = torch.cdist(fixed, rows), torch.cdist(rows, fixed), torch.cdist(rows, rows)
    found = [follower.owners_of(one) for one in made]
    assert [one.axis for one in found if isinstance(one, Rows)] == [1, 0]
    assert isinstance(found[2], Mixed)


def test_memory_of_a_replaced_buffer_holds_data_again() -> None:
    buffers = [torch.ones(2)]
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, buffers)
    assert follower.owners_of(buffers[0]) is None
    buffers.clear()
    later = [torch.ones(2) for _ in range(50)]
    assert all(follower.owners_of(tensor) is MIXED for tensor in later)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_repeated_row_that_is_changed_in_place_is_refused(by_rows: bool) -> None:
    def changed(m: Any, x: Tensor) -> Tensor:
        types = F.embedding(torch.zeros(x.shape[:2], dtype=torch.long), m.w)
        if by_rows:
            types[1:] *= 2.0
        else:
            types += x
        return types * x

    module, bags = Uses(changed, w=drawn(2, 3)), bags_of(4, 3)
    with pytest.raises(PrivacyError, match="keep the samples apart"):
        assert_agrees(
            module, lambda batch: summed(module(torch.cat(batch)), batch), lambda chosen: [bags[i] for i in chosen]
        )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, other, one: x * other,
        lambda x, other, one: one * torch.ones(4, 3),
        lambda x, other, one: F.linear(x, other),
        lambda x, other, one: torch.cat([x, other], 1),
        lambda x, other, one: torch.linalg.pinv(x),
        lambda x, other, one: torch.linalg.solve(x[1:].expand(3, 3, 3) + torch.eye(3), torch.ones(3, 3)),
        lambda x, other, one: torch.linalg.solve_triangular(x[None, 1:], other[None, 1:], upper=True),
        lambda x, other, one: F.pad(x, (0, 0, 1, -1)),
        lambda x, other, one: torch.renorm(x, 2, 0, 1.0),  # of which nothing is known
        lambda x, other, one: x.max(),
        lambda x, other, one: torch.cat([x, x]).scatter_add(0, torch.tensor([[0] * 3, [7] * 3]), other[:2]),
    ],
)
def test_results_of_several_samples_have_no_owners(function: Callable[..., Tensor]) -> None:
    x, other, one = torch.ones(4, 3), torch.ones(4, 3), torch.ones(1, 3)
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 4, []) as follower:
        follower.note(x, Rows(0, torch.arange(4)))
        follower.note(other, Rows(0, torch.tensor([1, 0, 3, 2])))
        follower.note(one, Rows(0, torch.tensor([2])))
        assert isinstance(follower.owners_of(function(x, other, one)), Mixed)


@pytest.mark.parametrize("find", [torch.where, torch.nonzero, torch.argwhere, lambda x: x.nonzero(as_tuple=True)])
def test_positions_have_the_owners_of_their_entries(find: Callable[[Tensor], Any]) -> None:
    """As many as there are samples, by chance."""
    mask = torch.tensor([[True, True], [False, False]])
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, []) as follower:
        follower.note(mask, follower.samples(mask.device))
        found = find(mask)
        owners = [follower.owners_of(one) for one in (found if isinstance(found, tuple) else [found])]
    assert all(isinstance(one, Rows) and one.axis == 0 and one.index.tolist() == [0, 0] for one in owners)


@pytest.mark.parametrize(
    "sort",
    [
        lambda x: torch.sort(x, 0, True).indices,
        lambda x: x.sort(descending=True)[1],
        lambda x: x.argsort(0, descending=True),
        lambda x: torch.argsort(input=x, dim=0, descending=True),
    ],
)
def test_equal_values_keep_their_order_in_a_sort(sort: Callable[[Tensor], Tensor]) -> None:
    """Otherwise the values of one sample would decide on the order of another's."""
    values = torch.zeros(60)
    values[::3] = 1.0
    expected = values.sort(descending=True, stable=True).indices
    assert not torch.equal(sort(values), expected)
    with Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, []):
        assert torch.equal(sort(values), expected)


def test_windows_over_rows_of_two_samples_are_mixed() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 3, [])
    rows = torch.ones(3, 4)
    follower.note(rows, Rows(0, torch.arange(3)))
    with follower:
        within, over = rows.as_strided((3, 2, 3), (4, 1, 1)), rows.as_strided((2, 4), (4, 1), 2)
    assert isinstance(follower.owners_of(within), Rows)
    assert isinstance(follower.owners_of(over), Mixed)


def test_a_view_leaves_rows_of_two_samples_mixed() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows, made, whole = torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(2, 3)
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1])))
    follower.note(made, None)
    follower.note(whole, None)
    with follower:
        whole[1].copy_(rows[2, :1])
        made[1:].add_(rows[1:])
        before = follower.owners_of(made)
        made[:2].add_(rows[1:])
    assert isinstance(before, Rows)
    assert before.index.tolist() == [-1, 0, 1]
    assert isinstance(follower.owners_of(made), Mixed)
    found = follower.owners_of(whole)
    assert isinstance(found, Rows)
    assert found.index.tolist() == [-1, 1]


@pytest.mark.parametrize(
    "take",
    [lambda made: made[:1], lambda made: made.unbind()[0], lambda made: next(iter(made)), lambda made: made.data],
    ids=["slice", "unbind", "iteration", "data"],
)
def test_a_view_of_zeros_that_rows_are_added_to_is_mixed(take: Callable[[Tensor], Tensor]) -> None:
    """Zeros of which nothing has a view may get owners without a look at other views."""
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    rows, index = torch.ones(3, 2), torch.arange(3)
    follower.note(rows, Rows(0, torch.tensor([0, 0, 1])))
    follower.note(index, None)
    with follower:
        added, made = rows.new_zeros(3, 2).index_add_(0, index, rows), rows.new_zeros(3, 2)
        view = take(made)
        before = follower.owners_of(view)
        made.index_add_(0, index, rows)
    assert before is None
    assert isinstance(follower.owners_of(view), Mixed)
    for one in (added, made):
        found = follower.owners_of(one)
        assert isinstance(found, Rows)
        assert found.index.tolist() == [0, 0, 1]


def test_sparse_data_after_a_write_is_of_unknown_owners() -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 2, [])
    dense, sparse = torch.ones(4, 3), torch.eye(4).to_sparse()
    with follower:
        follower.note(dense, Rows(0, torch.tensor([0, 0, 1, 1])))
        follower.note(sparse, Rows(0, torch.tensor([0, 0, 1, 1])))
        part = dense[:2]
        part.mul_(torch.ones(3))
        dense[1:3] = dense.flip(0)[1:3]
        assert isinstance(follower.owners_of(sparse @ dense), Mixed)


ALL, LAST_TWO = slice(None), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("index", "value", "stays"),
    [
        ((Ellipsis, 1), lambda x: x[..., 0], True),
        ((ALL, LAST_TWO), lambda x: x[:, :2], True),
        ((ALL, ALL, LAST_TWO), lambda x: x[..., :1], True),
        ((ALL, None, 1), lambda x: x[:, None, 0], True),
        ((ALL, 0), lambda x: 2.0, True),
        ((ALL, 0), lambda x: torch.ones(3), True),
        ((ALL, 0), lambda x: x.flip(0)[:, 1], False),
        ((ALL, ALL), lambda x: x[:, 0], False),  # the rows of a batch of three stand at three places of each row
        ((ALL, 0), lambda x: x[0], False),
        ((torch.tensor([2, 1, 0]),), lambda x: x, False),
        ((slice(0, 1),), lambda x: x[1:2], False),
    ],
)
def test_owners_after_a_write_are_those_of_what_is_written(
    index: Any, value: Callable[[Tensor], Any], stays: bool
) -> None:
    follower = Follower(Tracker(Recorder(), materialise=False, workspace=None), 3, [])
    with follower:
        follower.note(LAST_TWO, None)
        follower.note(x := torch.rand(3, 3, 3), follower.samples(x.device))
        x[index] = value(x.clone())
        owners = follower.owners_of(x)
    assert (owners is follower.samples(x.device)) == stays


def test_a_state_repeated_for_every_sample_agrees() -> None:
    torch.manual_seed(0)

    def function(m: Any, x: Tensor) -> Tensor:
        return m.next(m.layer(x, m.state.expand(len(x), -1)))[0] * m.gain.repeat(len(x), 1)

    first = nn.Linear(3, 3).double()
    held = {
        "first": first,
        "layer": nn.GRUCell(3, 3),
        "next": nn.LSTMCell(3, 3),
        "state": drawn(1, 3),
        "gain": drawn(1, 3),
    }
    module, bags = Uses(function, **held), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = first(torch.cat(batch)).split([len(bag) for bag in batch])
        return module(torch.stack([one.mean(0) for one in rows])).square().sum(1)

    for size in (2, 3, 4):
        engine = assert_agrees(module, loss, lambda chosen: [bags[i].clone() for i in chosen], size=size)
        assert engine.follows_owners


def test_an_index_written_between_two_uses_is_read_again() -> None:
    torch.manual_seed(0)
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        index = torch.arange(len(rows))
        once = layer(rows[index])
        index.numpy()[:] = index.flip(0).numpy()  # no operation of torch reports it
        again = layer(rows[index]).flip(0)
        return summed(once, batch) + summed(again.tanh(), batch)

    assert assert_agrees(layer, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


@pytest.mark.parametrize("name", ["sample_of_row", "batch"])
def test_owners_of_a_batch_stay_if_the_step_writes_to_it(name: str) -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 1).double(), bags_of(3)

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        counts = torch.tensor([len(bags[i]) for i in chosen])
        owners = torch.arange(len(chosen)).repeat_interleave(counts)
        found = {"x": torch.cat([bags[i] for i in chosen]), "y": torch.zeros(len(chosen), 3), name: owners}
        return found | ({"ptr": nn.functional.pad(counts.cumsum(0), (1, 0))} if name == "batch" else {})

    def loss(batch: dict[str, Tensor]) -> Tensor:
        rows = layer(batch["x"])
        batch[name].zero_()
        return head(rows.new_zeros(batch["y"].shape).index_add(0, batch[name], rows)).sum(1)

    with pytest.raises(PrivacyError, match="rows that come from index_add"):
        make(nn.ModuleList([layer, head]), loss, batch_of)


@pytest.mark.parametrize("by", ["lengths", "offsets"])
def test_reduced_segments_belong_to_the_owner_of_their_rows(by: str) -> None:
    torch.manual_seed(0)
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(bag) for bag in batch])
        given = lengths if by == "lengths" else F.pad(lengths.cumsum(0), (1, 0))
        return head(torch.segment_reduce(layer(torch.cat(batch)), "max", **{by: given})).square().sum(1)

    assert assert_agrees(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


@pytest.mark.parametrize("how", ["left", "right", "number"])
def test_tensordot_with_constants_keeps_the_owners(how: str) -> None:
    torch.manual_seed(0)
    layer, head, bags = nn.Linear(3, 4).double(), nn.Linear(2, 2).double(), bags_of(3)
    constant = torch.randn(2, 4, dtype=torch.float64)
    head.register_buffer("constant", constant)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = layer(torch.cat(batch))
        if how == "left":
            mixed = torch.tensordot(rows, constant, dims=([1], [-1]))
        elif how == "right":
            mixed = torch.tensordot(constant, rows, dims=([-1], [1])).T
        else:
            mixed = torch.tensordot(rows, constant.T, 1)
        return summed(head(mixed.tanh()), batch)

    assert assert_agrees(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


def test_tensordot_over_rows_mixes_samples() -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = layer(torch.cat(batch))
        return summed(head(torch.tensordot(torch.ones(len(rows), len(rows)).double(), rows, 1)), batch)

    with pytest.raises(PrivacyError, match="rows that come from tensordot"):
        make(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen])


def test_segments_of_two_samples_are_refused() -> None:
    layer, head, bags = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        lengths = torch.tensor([1, len(rows) - 1])
        return head(torch.segment_reduce(layer(rows), "sum", lengths=lengths)).square().sum(1)

    with pytest.raises(PrivacyError, match="rows that come from segment_reduce"):
        make(nn.ModuleList([layer, head]), loss, lambda chosen: [bags[i] for i in chosen])


def test_rows_in_an_order_of_the_data_agree() -> None:
    torch.manual_seed(0)
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        order = rows[:, 0].argsort()
        return summed(layer(rows[order])[order.argsort()], batch)

    assert assert_agrees(layer, loss, lambda chosen: [bags[i] for i in chosen]).follows_owners


# ---------------------------------------------------------------- recurrent layers


class FromStates(nn.Module):
    """Recurrent layers whose states are given; rows of a bag are its times."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.encoder, self.decoder = nn.LSTM(3, 4, batch_first=True), nn.LSTM(2, 4, batch_first=True)
        self.double()

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, lengths = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        zeros = x.new_zeros(1, len(x), 4)
        _, hidden, cell = torch._VF.lstm(  # type: ignore[attr-defined]
            packed.data, packed.batch_sizes, (zeros, zeros), self.encoder._flat_weights, True, 1, 0.0, False, False
        )
        hidden, cell = (state.index_select(1, packed.unsorted_indices) for state in (hidden, cell))
        if self.how == "hidden state of another":
            hidden = hidden.flip(1)
        elif self.how == "cell state of another":
            cell = cell.flip(1)
        given = x[:, :2, :2] if "another" in self.how else x.new_zeros(len(x), 3, 2)
        return self.decoder(given, (hidden, cell))[0].square().sum((1, 2))


def test_a_kernel_called_directly_agrees_by_owners() -> None:
    """The encoder gets packed rows in an order of the lengths, the decoder nothing but the encoder's states."""
    torch.manual_seed(0)
    module, data = FromStates("fed by zeros"), _features(6, 5, 3)
    for size in (2, 4, 6):
        assert assert_agrees(module, module, lambda chosen: (data[chosen], LENGTHS[chosen]), size=size).follows_owners


@pytest.mark.parametrize("how", ["hidden state of another", "cell state of another"])
def test_states_of_another_sample_are_refused(how: str) -> None:
    module, data = FromStates(how), _features(6, 5, 3)
    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        make(module, module, lambda chosen: (data[chosen], LENGTHS[chosen]))


def test_an_order_that_lies_does_not_change_the_owners() -> None:
    """A packed sequence that names another order than that of its rows, which the layer then gives back."""
    torch.manual_seed(0)
    module, bags = nn.ModuleList([nn.GRU(3, 4, batch_first=True), nn.Linear(3, 3)]).double(), bags_of(3)[1:]

    def loss(batch: list[Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence([module[1](bag) for bag in batch], batch_first=True)
        true = pack_padded_sequence(padded, torch.tensor([len(bag) for bag in batch]), True, False)
        lie = true.sorted_indices.flip(0)
        found = module[0](PackedSequence(true.data, true.batch_sizes, lie, lie.argsort()))[1][0]
        return found[lie][true.unsorted_indices].square().sum(1)

    assert assert_agrees(module, loss, lambda chosen: [bags[i] for i in chosen], size=3).follows_owners


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("how", ["edges", "repeated index", "self loops"])
def test_edges_between_graphs_are_refused(how: str) -> None:
    module, data = GCN("self loops" if how == "self loops" else "gcn"), [_graph(seed) for seed in range(4)]
    module.att.requires_grad_(False)
    module.of_edges.requires_grad_(False)

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        batch = _collate_graphs([data[i] for i in chosen])
        batch["edge_index"][1, 0] = len(batch["x"]) - 1  # the first edge of the first graph ends in the last one
        return batch

    def loss(batch: dict[str, Tensor]) -> Tensor:
        if how != "repeated index":
            return module(batch)
        rows = module.first(batch["x"])[batch["edge_index"][0]]
        index = batch["edge_index"][1].unsqueeze(1).repeat(1, 5)
        rows = torch.zeros(len(batch["x"]), 5, dtype=rows.dtype).scatter_reduce_(0, index, rows, "sum")
        return module.second(rows).new_zeros(len(batch["y"])).index_add(0, batch["batch"], module.second(rows).sum(1))

    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        make(module, loss, batch_of)


def test_owners_that_lie_are_refused() -> None:
    """One row of a set is said to belong to another one, into whose sum it does not go."""
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)[1:]

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        members = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(bags[i]) for i in chosen]))
        lie = members.clone()
        lie[0] = len(chosen) - 1
        return {"rows": torch.cat([bags[i] for i in chosen]), "members": members, "sample_of_row": lie}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        rows, members = batch["rows"], batch["members"]
        sums = rows.new_zeros(int(members.max()) + 1, 3).index_add_(0, members, layer(rows))
        return layer(sums).square().sum(1)

    with pytest.raises(PrivacyError, match="rows that come from index_add_"):
        make(layer, loss, batch_of)


@pytest.mark.parametrize("shared", [True, False])
def test_a_tensor_that_two_records_hold_is_refused(shared: bool) -> None:
    """Its gradients would count for one of them alone; a record that is there twice, whole, is one record."""
    layer, common = nn.Linear(3, 3).double(), _features(2, 3)
    records = [{"x": common if shared else common.clone(), "y": _features(1 + i, 3, seed=i)} for i in range(3)]

    def loss(batch: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([(layer(one["x"]).sum() - layer(one["y"]).sum()).square() for one in batch])

    if not shared:
        assert make(layer, loss, lambda chosen: [records[i] for i in chosen]).follows_owners
        return
    with pytest.raises(PrivacyError, match="rows that come from a tensor that two records share"):
        make(layer, loss, lambda chosen: [records[i] for i in chosen])


class Chosen(nn.Module):
    """Messages from row to row among those that their values choose; the first of each bag gets none."""

    def __init__(self, *, to_others: bool) -> None:
        super().__init__()
        self.first, self.last, self.to_others = nn.Linear(3, 3).double(), nn.Linear(3, 3).double(), to_others

    def forward(self, batch: list[Tensor]) -> Tensor:
        rows = self.first(torch.cat(batch))
        owners = torch.arange(len(batch)).repeat_interleave(torch.tensor([len(bag) for bag in batch]))
        kept = rows.detach()[:, 0] > -0.5
        rows, owners = rows[kept], owners[kept]
        senders = torch.arange(len(rows) - 1)[owners[1:] == owners[:-1]]
        sums = torch.zeros_like(rows).index_add(0, senders + 1, rows[senders])
        if self.to_others:
            sums = sums.flip(0)
        made = self.last(self.last(sums) + rows).square().sum(1)
        return torch.stack([made[owners == sample].sum() for sample in range(len(batch))])


def test_rows_that_get_no_message_belong_to_those_they_return_to() -> None:
    torch.manual_seed(0)
    module, bags = Chosen(to_others=False), bags_of(3)
    assert assert_agrees(module, module, lambda chosen: [bags[i] for i in chosen]).follows_owners


def test_messages_that_return_to_rows_of_others_are_refused() -> None:
    module, bags = Chosen(to_others=True), bags_of(3)
    with pytest.raises(PrivacyError, match="rows of known samples, got rows that come from add"):
        make(module, module, lambda chosen: [bags[i] for i in chosen])


def test_an_index_that_differs_between_columns_is_refused() -> None:
    layer, bags = nn.Linear(3, 3).double(), bags_of(3)

    def loss(batch: list[Tensor]) -> Tensor:
        rows = torch.cat(batch)
        index = torch.arange(len(rows)).unsqueeze(1).repeat(1, 3)
        index[:, 2] = index[:, 2].flip(0)
        return layer(torch.zeros_like(rows).scatter_add_(0, index, rows)).sum(1)

    with pytest.raises(PrivacyError, match="rows that come from scatter_add_"):
        make(layer, loss, lambda chosen: [bags[i] for i in chosen])


def test_entries_of_a_parameter_for_each_sample_are_refused() -> None:
    """A map over the samples would give each of them all entries."""
    module, bags = Uses(lambda m, x: torch.bmm(m.w[: len(x)] + 0.0, x), w=drawn(9, 2, 4)), bags_of(4, 3)

    def loss(batch: list[Tensor]) -> Tensor:
        first = torch.stack([bag[0] for bag in batch])
        return module(first).square().sum((1, 2))

    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))

    def run(size: int) -> None:
        batch = (bags * 2)[:size]
        engine.see(batch)
        loss(batch).sum().backward()

    with pytest.raises(PrivacyError, match=r"(keep the samples apart|can be computed for every sample by itself)"):
        engine.learn_layout(run)


# ---------------------------------------------------------------- orders of folded rows


class TwoFolds(nn.Module):
    """One layer on rows that are neighbours, one on rows that are apart and all alike when they are first seen."""

    def __init__(self, *, followed: bool = True) -> None:
        super().__init__()
        self.followed = followed
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.flatten(0, 1)).view(x.shape)
        if not self.followed:
            rows = rows + torch.from_numpy(rows.detach().numpy() * 0)
        apart = (rows * self.gate).transpose(0, 1).reshape(-1, 3)
        return (rows + self.last(apart).view(x.shape[1], -1, 3).transpose(0, 1)).square().sum((1, 2))


def test_rows_all_alike_do_not_take_the_order_of_others() -> None:
    torch.manual_seed(0)
    module, data = TwoFolds(), _features(6, 4, 3)
    engine = assert_agrees(module, module, lambda chosen: data[chosen], size=6)
    assert not engine.follows_owners  # owners settle the order, once


def test_rows_all_alike_whose_owners_are_lost_are_refused() -> None:
    module, data = TwoFolds(followed=False), _features(6, 4, 3)
    with pytest.raises(PrivacyError, match=r"linear of 'last.weight'.*4 rows per sample.*Nor can rows be followed"):
        make(module, module, lambda chosen: data[chosen])


class Experts(nn.Module):
    """Rows sorted by their expert, and one product for the rows of each expert, as mixtures have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(3, 3), nn.Parameter(drawn(2, 3, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.flatten(0, 1))
        expert = (x.flatten(0, 1)[:, 0] > 0).long()
        order = expert.argsort(stable=True)
        made = _grouped(rows[order], self.weight, expert.bincount(minlength=2).cumsum(0))
        return made[order.argsort()].view(x.shape).square().sum((1, 2))


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A product that torch dispatches as a whole: rows up to each end with the weight of their own."""
    if torch.overrides.has_torch_function((rows, weight)):
        return torch.overrides.handle_torch_function(_grouped, (rows, weight), rows, weight, ends)
    of = torch.searchsorted(ends, torch.arange(len(rows)), right=True)
    return (rows.unsqueeze(1) @ weight[of.clamp(max=len(weight) - 1)]).squeeze(1)


def test_rows_sorted_by_data_are_not_dealt_out_by_position() -> None:
    module, data = Experts(), _features(6, 4, 3)
    with pytest.raises(PrivacyError, match=r"rows of _grouped of .*in the order of the samples, got them in another"):
        make(module, module, lambda chosen: data[chosen])


def test_a_map_over_samples_does_not_change_the_forward() -> None:
    """Where the layout was learned, one expert had all rows; the map would give each sample the ends of all."""
    module, data = Experts(), _features(6, 4, 3)
    data[..., 0] = data[..., 0].abs() * torch.tensor([-1, -1, 1, 1, 1, 1])[:, None]
    engine = make_engine(module, module, data)
    with pytest.raises(PrivacyError, match=r"Expected _grouped of 'weight' to keep the samples apart"):
        run_batch(engine, module, data, 4)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.one_in(2)
def test_attention_over_few_tokens_agrees(tokens: int, batch_first: bool, alike: bool) -> None:
    """As many tokens as samples, or half as many; tokens whose values are all equal."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first).double()
    data = _features(6, 1, 4).expand(6, tokens, 4).contiguous() if alike else _features(6, tokens, 4)

    def loss(x: Tensor) -> Tensor:
        return (layer(x) if batch_first else layer(x.transpose(0, 1)).transpose(0, 1)).square().sum((1, 2))

    for size in (2, 4):
        assert_agrees(layer, loss, lambda chosen: data[chosen], size=size)


def test_one_size_does_not_tell_samples_from_columns() -> None:
    """Two samples in a batch of two columns, where only runs on two were seen."""
    module = nn.Linear(3, 1)
    engine = PerSampleEngine(module)
    rows = engine._rows
    rows._learning_size = 2
    engine.see((torch.zeros(2, 3), torch.zeros(2)))
    rows._learning_size, rows.follows_owners = None, True
    engine.set_parameters(dict(module.named_parameters()))
    engine.begin(2)
    batch = (torch.zeros(2, 3), torch.zeros(2))
    engine.see(batch)
    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        module(batch[0])
    engine.end()


def test_steps_within_torch_func_are_refused_by_name() -> None:
    """A fast weight of each record, by an inner step; torch hides the memory of what it differentiates."""

    def of_one(weight: Tensor, row: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w: (row @ w - 1).square())(weight)
        return (row @ (weight - 0.1 * inner)).square()

    module = Uses(lambda m, x: torch.stack([of_one(m.w, row) for row in x]).mean(), w=drawn(3))
    data = drawn(4, 3).double()
    with pytest.raises(PrivacyError, match="to meet rows of known samples"):
        make(module, module, lambda chosen: data[chosen])
