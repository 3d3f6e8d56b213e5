"""Owners of rows through operations: recurrent layers, and what must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from tests.per_sample.owners import GCN, _collate_graphs, _features, _graph, assert_agrees, make
from tests.per_sample.test_following import LENGTHS, bags_of
from tests.per_sample.ways_of_use import Uses, drawn

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


READ: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensors": (lambda x: x, lambda x: x),
    "arrays": (lambda x: x.numpy(), torch.from_numpy),
    "copied arrays": (lambda x: x.numpy(), torch.tensor),
}


@pytest.mark.parametrize("how", list(READ))
@pytest.mark.parametrize("shared", [True, False])
def test_a_tensor_that_two_records_hold_is_refused(shared: bool, how: str) -> None:
    """Its gradients would count for one of them alone; a record that is there twice, whole, is one record."""
    layer, (held, read), common = nn.Linear(3, 3).double(), READ[how], _features(2, 3)
    first = held(common)
    records = [
        {"x": first if shared else held(common.clone()), "y": held(_features(1 + i, 3, seed=i))} for i in range(3)
    ]

    def loss(batch: list[dict[str, Any]]) -> Tensor:
        return torch.stack([(layer(read(one["x"])).sum() - layer(read(one["y"])).sum()).square() for one in batch])

    if not shared:
        assert assert_agrees(layer, loss, lambda chosen: [records[i] for i in chosen], size=3).follows_owners
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


def test_entries_of_a_parameter_for_each_sample_go_to_it() -> None:
    """A map over the samples would give each of them all entries; that a record alone gets others, checks see."""
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

    engine.learn_layout(run)
    engine.begin(4)
    run(4)
    engine.check_tracked()
    grads = engine.per_sample_gradients()["w"]
    engine.end()
    run(4)
    whole = module.w.grad
    assert whole is not None
    for i in range(4):
        torch.testing.assert_close(grads[i, i], whole[i])
        assert not grads[i, i + 1 :].any()
        assert not grads[i, :i].any()
