"""Rows that a collate function joins, as many as if each record had equally many, while some have none."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.trials.joined import joined_lengths, stacked_shapes, unequal_sums
from tests.cases import each
from tests.per_sample.test_owned_training import Training, fit

NUM = 6
Sets = list[tuple[Tensor, Tensor]]


class TwoSets(nn.Module):
    """The losses of records that are two sets, each with its own layer; numbers of members come with the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        first, num_first, second, num_second = batch
        losses = first.new_zeros(len(num_first))
        for layer, rows, num in ((self.first, first, num_first), (self.second, second, num_second)):
            owners = torch.arange(len(num)).repeat_interleave(num)
            losses = losses.index_add(0, owners, layer(rows).square().sum(1))
        return losses


class OneSet(TwoSets):
    """The same of the first set, in a batch that says nothing of numbers."""

    def forward(self, batch: Any) -> Tensor:
        return self.first(batch).square().sum() / NUM


class Later(Training):
    """A module whose training data become irregular after the checks before the third step."""

    change: Any

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.strategy.ledger.num_steps == 2:  # not a count that trials lead on
            self.change()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads = {name: p.grad.clone() for name, p in self.inner.named_parameters() if p.grad is not None}
        for p in self.parameters():
            p.grad.zero_()  # type: ignore[union-attr]


def sets(first: list[int], second: list[int]) -> Sets:
    generator = torch.Generator().manual_seed(sum(first))
    return [tuple(torch.randn(num, 3, generator=generator) for num in pair) for pair in zip(first, second, strict=True)]  # type: ignore[misc]


def join(records: Sets) -> Any:
    return [
        part
        for number in (0, 1)
        for part in (torch.cat([r[number] for r in records]), torch.tensor([len(r[number]) for r in records]))
    ]


def join_one(records: Sets) -> Tensor:
    return torch.cat([r[0] for r in records])


def train(inner: nn.Module, regular: Sets, irregular: Sets, collate: Any) -> Any:
    records, made = list(regular), []

    def kind(module: nn.Module) -> Later:
        made.append(Later(module))
        made[0].change = map(records.__setitem__, [slice(None)], [irregular]).__next__  # no watch looks into a map
        return made[0]

    options = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "sampling": "shuffle"}
    fit(inner, records, collate, kind=kind, epochs=5, batch_size=NUM, **options)
    return made[0].grads


EACH = [1] * NUM
UNEQUAL = [4, 0, 1, 0, 1, 0]
RAGGED = [2, 1, 3, 2, 1, 3]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num", [1, 3])
def test_positions_of_unequal_rows_are_refused(num: int) -> None:
    regular, irregular = ([num * each for each in nums] for nums in (EACH, UNEQUAL))
    with pytest.raises(PrivacyError, match=r"(?s)unequal (numbers of rows|parts of records).*sample_of_row"):
        train(OneSet(), sets(regular, regular), sets(irregular, irregular), join_one)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lengths_in_the_batch_name_the_records_of_rows() -> None:
    inner, irregular = TwoSets(), sets(UNEQUAL, RAGGED)
    _assert_sum_of_each(inner, train(inner, sets(EACH, RAGGED), irregular, join), irregular, join)


def _assert_sum_of_each(inner: nn.Module, found: Any, records: Sets, collate: Any) -> None:
    expected = {name: torch.zeros_like(p) for name, p in inner.named_parameters()}
    for record in records:
        inner.zero_grad()
        inner(collate([record])).sum().backward()
        norm = torch.cat([p.grad.flatten() for p in inner.parameters() if p.grad is not None]).norm()
        for name, p in inner.named_parameters():
            if p.grad is None:
                continue
            expected[name] += p.grad * min(1.0, 0.1 / float(norm)) / NUM  # type: ignore[operator]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_two_lengths_name_are_refused() -> None:
    regular = sets(RAGGED, RAGGED)
    with pytest.raises(PrivacyError, match="whose owners the batch does not name clearly"):
        train(TwoSets(), regular, sets(RAGGED, [0, 3, 3, 2, 1, 3]), join)


class Cloud:
    """A record that is an object, which may be called."""

    def __init__(self, num: int) -> None:
        self.points = torch.zeros(num, 7)

    def __call__(self) -> None: ...


class Slots:
    """A record that holds its points in a slot."""

    __slots__ = ("points",)

    def __init__(self, num: int) -> None:
        self.points = torch.zeros(num, 7)


class SlotsAndMore(Slots): ...


class Boxes(Tensor): ...


class Points(list[Any]): ...


class Pictures(TwoSets):
    """The losses of records that are a picture with boxes, whose first column has the number of the picture."""

    def __init__(self, *, reads_boxes: bool) -> None:
        super().__init__()
        self.reads_boxes = reads_boxes

    def forward(self, batch: Any) -> Tensor:
        pictures, boxes = batch
        owners, made = boxes[:, 0].long(), self.first(pictures).squeeze(1)
        wanted = self.second(boxes[:, 1:]) if self.reads_boxes else boxes[:, 2:]
        return made.square().sum(1).index_add(0, owners, (made[owners] * wanted).square().sum(1))


def join_boxes(records: Sets) -> Any:
    owners = torch.arange(len(records)).repeat_interleave(torch.tensor([len(boxes) for boxes, _ in records]))
    boxes = torch.cat([owners[:, None], torch.cat([boxes for boxes, _ in records])], 1)
    return torch.stack([picture for _, picture in records]), boxes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reads_boxes", [False, True])
def test_stacked_records_stay_known_next_to_as_many_rows(reads_boxes: bool) -> None:
    inner, irregular = Pictures(reads_boxes=reads_boxes), sets(UNEQUAL, EACH)
    _assert_sum_of_each(
        inner, train(inner, sets([0, 2, 3, 2, 0, 3], EACH), irregular, join_boxes), irregular, join_boxes
    )


@each(
    "kind, expected",
    [
        (lambda num: torch.zeros(num, 7), {6}),
        (lambda num: torch.zeros(num, 7).as_subclass(Boxes), {6}),
        (lambda num: OrderedDict(points=torch.zeros(num, 7)), {6}),
        (lambda num: Points([torch.zeros(num, 7)]), {6}),
        (lambda num: pack_sequence([torch.zeros(num + 1, 7)]), {9}),
        (lambda num: SlotsAndMore(num), {6}),
        (lambda num: [None, torch.zeros(num, 7)], {6}),
        (lambda num: (np.float64(num), object(), torch.zeros(num, 7)), {6}),  # without attributes
        (lambda num: (torch.zeros(2, num), num), {6}),
        (lambda num: {"words": [1] * num}, {6}),
        (lambda num: [torch.zeros(num, 7), torch.zeros(1, 7)], {9}),
        (lambda num: [torch.zeros(2, 7)] * num, {6, 12, 42}),
        (lambda num: Cloud(num), {6}),
        (lambda num: [Cloud(num)], {6}),
        (lambda num: {"points": torch.zeros(num, 7).numpy()}, {6}),
        (lambda num: num, set()),
        (lambda num: torch.zeros(5), set()),
    ],
)
def test_lengths_that_differ_are_added_up(kind: Any, expected: set[int]) -> None:
    assert unequal_sums([kind(num) for num in (4, 0, 2)]) == expected


def test_names_in_another_order_are_the_same_parts() -> None:
    first, second = {"a": torch.zeros(3), "b": torch.zeros(2, 9)}, {"b": torch.zeros(2, 9), "a": torch.zeros(1)}
    assert unequal_sums([first, second]) == {4}


@pytest.mark.parametrize(
    ("others", "made", "expected"),
    [
        ([torch.zeros(4, 5)], [torch.zeros(3, 5, 4)], set()),  # stacked, in another order of axes
        ([torch.zeros(4)], [torch.zeros(3, 2)], {3}),
        ([1.0], [torch.zeros(3)], set()),
        ([1.0], [torch.zeros(3), torch.zeros(3)], {3}),
        ([[1, 2]], [torch.zeros(3, 2)], set()),
        ([], [torch.zeros(6, 2)], set()),
        ([torch.zeros(4, 5)], [torch.zeros(3, 5, 4), torch.zeros(3, 2)], {3, (3, 5, 4)}),
    ],
)
def test_joined_parts_are_told_from_stacked_ones(others: list[Any], made: list[Tensor], expected: set[Any]) -> None:
    records = [{"set": [0] * num, **dict(enumerate(others))} for num in (2, 0, 1)]
    stacked = stacked_shapes(records[0]) & stacked_shapes(records[-1])
    assert joined_lengths(unequal_sums(records), len(records), stacked, made) == expected


def test_records_with_a_missing_part_differ() -> None:
    assert unequal_sums([{"a": torch.zeros(3)}, {}, {"b": torch.zeros(2)}]) == {3, 2}
