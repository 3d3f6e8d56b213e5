"""Rows that belong to samples by an index: packed sequences, what must be refused, and batches unlike those before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from tests.per_sample.owners import GCN, _collate_graphs, _features, _graph, assert_agrees, make

# ---------------------------------------------------------------- packed sequences


@pytest.mark.parametrize("kind", ["lstm", "gru", "layer", "packed in forward"])
def test_packed_sequences_agree_with_batches_of_one(kind: str) -> None:
    torch.manual_seed(0)
    sequences = [_features(2 + (3 * i) % 5, 3, seed=i) for i in range(4)]
    inner: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.LSTM)(3, 4, batch_first=True)
    module = nn.ModuleDict({"first": nn.Linear(3, 3), "inner": inner, "head": nn.Linear(4, 1)}).double()
    if kind == "layer":
        module.pop("inner")
        module["inner"] = nn.Linear(3, 4).double()

    def batch_of(chosen: list[int]) -> Any:
        picked = [sequences[i] for i in chosen]
        if kind == "packed in forward":
            return {"x": pad_sequence(picked, batch_first=True), "n": torch.tensor([len(one) for one in picked])}
        return pack_sequence(picked, enforce_sorted=False)

    def loss(batch: Any) -> Tensor:
        if kind == "packed in forward":
            batch = pack_padded_sequence(batch["x"], batch["n"], batch_first=True, enforce_sorted=False)
        given = batch._replace(data=module["first"](batch.data))
        if kind == "layer":
            hidden, lengths = pad_packed_sequence(given._replace(data=module["inner"](given.data)), batch_first=True)
            mask = torch.arange(hidden.shape[1]) < lengths[:, None]
            pooled = torch.where(mask[..., None], hidden, 0.0).sum(1)
        else:
            state = module["inner"](given)[1]
            pooled = (state[0] if isinstance(state, tuple) else state)[-1]
        return module["head"](pooled).squeeze(1).square()

    assert_agrees(module, loss, batch_of)


# ---------------------------------------------------------------- refusals


def test_graphs_that_were_dropped_are_refused() -> None:
    module, data = GCN("gcn"), [_graph(seed) for seed in range(4)]
    engine = make(module, module, lambda chosen: _collate_graphs([data[i] for i in chosen]))
    engine.begin(4)
    with pytest.raises(PrivacyError, match=r"batch of 4 graphs as drawn, got 3"):
        engine.see(_collate_graphs(data[:3]))
    engine.end()


@pytest.mark.parametrize(
    "index", [torch.tensor([0, 1, 4]), torch.tensor([-1, 0, 1]), torch.zeros(3), torch.zeros(3, 1, dtype=torch.long)]
)
def test_owners_that_name_no_sample_are_refused(index: Tensor) -> None:
    engine = PerSampleEngine(nn.Linear(2, 1))
    engine._rows._learning_size = 2
    with pytest.raises(PrivacyError, match="Expected sample_of_row to give each row one of 2 samples"):
        engine.see({"rows": torch.zeros(3, 2), "sample_of_row": index})


class Mixing(nn.Module):
    """Graphs whose nodes meet each other across samples before a layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(2, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        if self.how == "softmax":
            rows = rows.softmax(0)
        elif self.how == "sum":
            rows = rows.sum(0, keepdim=True).expand(len(rows), -1) + rows
        elif self.how == "products":
            rows = (rows @ rows.T) @ rows
        elif self.how == "shift":
            rows = rows + rows.roll(1, 0)
        elif self.how == "padding":
            rows = rows + F.pad(rows, (0, 0, 1, -1))
        elif self.how == "batch norm":
            rows = F.batch_norm(rows, None, None, training=True)
        elif self.how == "variance":
            rows = rows / rows.var(True)
        elif self.how == "counts":
            rows = rows * torch.repeat_interleave(rows.detach().abs().sum(1).long() + 1)[: len(rows), None]
        elif self.how == "view":
            kept = torch.zeros_like(rows)
            view = kept.view(-1)
            kept += rows
            rows = view.view(-1, 2)
        elif self.how == "numpy":
            rows = torch.from_numpy(rows.detach().numpy().copy())
        return self.layer(rows).squeeze(1)


@pytest.mark.parametrize(
    "how", ["softmax", "sum", "products", "shift", "padding", "batch norm", "variance", "counts", "view", "numpy"]
)
def test_rows_that_meet_across_samples_are_refused(how: str) -> None:
    module, sets = Mixing(how), [_features(2 + i, 2, seed=i) for i in range(3)]

    def batch_of(chosen: list[int]) -> dict[str, Tensor]:
        index = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(sets[i]) for i in chosen]))
        return {"rows": torch.cat([sets[i] for i in chosen]), "sample_of_row": index}

    with pytest.raises(PrivacyError, match=r"Nor can rows be followed.*meet rows of known samples"):
        make(module, lambda batch: module(batch["rows"]), batch_of)


def test_owners_are_not_carried_to_the_next_batch() -> None:
    """A tensor that the module keeps from one batch has no owners in the next one."""
    data = [_features(2 + i, 2, seed=i) for i in range(3)]
    module = nn.Linear(2, 1).double()
    kept = SimpleNamespace(rows=None)

    def loss(batch: list[Tensor]) -> Tensor:
        before, kept.rows = kept.rows, torch.cat(batch)
        return module(kept.rows if before is None or not kept.on else before).sum()

    kept.on = False
    engine = make(module, loss, lambda chosen: [data[i] for i in chosen])
    kept.on = True
    engine.begin(2)
    engine.see(data[:2])
    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        loss(data[:2])
    engine.end()


class Joined(nn.Module):
    """Rows of all records joined, with nothing that says whose they are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.layer = how, nn.Linear(3, 1)
        self.double()

    def forward(self, rows: Tensor) -> Tensor:
        if self.how == "of the batch":  # (B, T, 3): how many rows a sample has follows from the batch
            return self.layer(rows.flatten(0, 1)).view(len(rows), -1).sum(1)
        return self.layer(rows).view(-1, 2).sum(1)


@pytest.mark.parametrize(
    ("how", "alike", "works"), [("joined", True, False), ("joined", False, True), ("of the batch", True, True)]
)
def test_rows_per_sample_may_change_only_if_they_are_known(how: str, alike: bool, works: bool) -> None:
    """Four records with 2, 4, 4 and 2 rows: divisible, and dealt to the wrong samples without a word."""
    module = Joined(how)
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    shape = (2, 3) if how == "of the batch" else (3,)

    def run(size: int) -> None:
        batch = _features(5, *shape)[:size] if how == "of the batch" else _features(20, 3)[: 2 * size]
        engine.see(batch)
        module(batch).sum().backward()

    engine.learn_layout(run, alike=alike)
    assert not engine.follows_owners
    engine.begin(4)
    batch = _features(4, 3, 3) if how == "of the batch" else _features(12, 3)
    engine.see(batch)
    if works:
        module(batch).sum().backward()
    else:
        with pytest.raises(PrivacyError, match=r"hold 2 row\(s\) for each of 4 samples, got length=12"):
            module(batch)
    engine.end()
