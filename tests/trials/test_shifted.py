"""Indices of records that a collate function shifts: they must name entries of their own record."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.loop.batches import DrawnBatch
from lightning_dp.sampling.batches import MicrobatchCollate
from lightning_dp.trials.loading import LoadingWatch
from lightning_dp.trials.shifted import check_shifted
from tests.cases import each


class Record:
    """A graph as an object, whose attributes are read by name."""

    def __init__(self, nodes: Tensor, edges: Tensor) -> None:
        self.nodes, self.edges = nodes, edges


def graph(num: int, *pairs: tuple[int, int], form: str = "dict") -> Any:
    nodes, edges = torch.zeros(num, 3), torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    if form == "nested":
        return {"graph": (nodes, edges), "label": 1}
    return Record(nodes, edges) if form == "object" else {"nodes": nodes, "edges": edges}


def parts_of(record: Any) -> tuple[Tensor, Tensor]:
    if isinstance(record, Record):
        return record.nodes, record.edges
    return record["graph"] if "graph" in record else (record["nodes"], record["edges"])


def collate(records: list[Any]) -> dict[str, Tensor]:
    nodes, edges = zip(*map(parts_of, records), strict=True)
    begins = torch.tensor([0, *map(len, nodes)]).cumsum(0).tolist()
    shifted = [each + begin for each, begin in zip(edges, begins, strict=False)]
    return {"nodes": torch.cat(nodes), "edges": torch.cat(shifted, 1)}


@each("form", ["dict", "nested", "object"])
@each(
    "pairs, is_own",
    [
        ([(0, 1), (1, 1)], True),
        ([(0, 1), (1, 2)], False),
        ([(2, 3)], False),
        ([(-1, 0)], False),
        ([], True),
    ],
)
def test_edges_must_name_nodes_of_their_own_graph(form: str, pairs: Any, is_own: bool) -> None:
    records = [graph(3, (0, 2), form=form), graph(2, *pairs, form=form), graph(4, (3, 0), form=form)]
    if is_own:
        check_shifted(records, collate(records))
        return
    with pytest.raises(PrivacyError, match="Expected indices of a record to name entries of that record"):
        check_shifted(records, collate(records))


def test_edges_may_not_reach_a_graph_without_edges() -> None:
    records = [graph(2, (0, 1)), graph(2, (1, 3)), graph(4), graph(2, (0, 1))]
    with pytest.raises(PrivacyError, match="'edges' with one beyond them"):
        check_shifted(records, collate(records))


def test_other_whole_numbers_are_left_alone() -> None:
    tokens = [{"edges": torch.tensor([[9, 9]])}, {"edges": torch.tensor([[7, 7]])}]
    check_shifted(tokens, torch.cat([one["edges"] for one in tokens], 1))  # joined, not shifted
    check_shifted(tokens, torch.tensor([[1, 2, 3, 4]]))  # other numbers altogether
    check_shifted(tokens, torch.cat([one["edges"] for one in tokens], 1) + 1)  # a word for padding comes first
    check_shifted([{"y": torch.tensor([[1, 2]])}, {"y": torch.tensor([[1], [2]])}], torch.zeros(2, 2))


def test_each_microbatch_is_checked_where_it_is_collated() -> None:
    records = [graph(2, (0, 2)), graph(2, (0, 1)), graph(2, (0, 1)), graph(2, (0, 1))]
    with pytest.raises(PrivacyError, match="name entries of that record"):
        MicrobatchCollate(collate, 2, LoadingWatch())(records)
    assert len(MicrobatchCollate(collate, 2, LoadingWatch())(records[1:])) == 2


def test_unequal_parts_of_records_are_noted() -> None:
    batch = MicrobatchCollate(collate, 2, LoadingWatch())([graph(2), graph(4), graph(1), graph(1)])
    assert batch.joined == {6}  # nodes of the first two; the others are equal
    assert DrawnBatch(lambda: batch, None, 0).joined == {6}
