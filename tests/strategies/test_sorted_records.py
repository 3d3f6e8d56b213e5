"""Collate functions that sort their records: records train together, and what mixes them is refused as ever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.loading import LoadingWatch
from lightning_dp.trials.row_order import RowOrder
from tests.cases import each
from tests.helpers import make_trainer

Record = tuple[Tensor, int]
NUM = 24


def sequences() -> list[Record]:
    """Sequences of which some are as long as others."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2 + 3 * i % 5, 4, generator=generator), i % 3) for i in range(NUM)]


def by_length(records: list[Record]) -> tuple[Tensor, Tensor, Tensor]:
    records = sorted(records, key=lambda record: -len(record[0]))
    parts, labels = [x for x, _ in records], torch.tensor([y for _, y in records])
    return pad_sequence(parts), torch.tensor([*map(len, parts)]), labels


def packed(records: list[Record]) -> tuple[PackedSequence, None, Tensor]:
    x, lengths, labels = by_length(records)
    return pack_padded_sequence(x, lengths), None, labels


def joined(records: list[Record]) -> tuple[Tensor, Tensor, Tensor]:
    x, lengths, labels = by_length(records)
    return torch.cat([x[:length, i] for i, length in enumerate(lengths.tolist())]), lengths, labels


def by_value(records: list[Record]) -> tuple[Tensor, Tensor]:
    """An exchange of records moves others."""
    records = sorted(records, key=lambda record: float(record[0][0, 0]))
    return pad_sequence([x for x, _ in records]), torch.tensor([y for _, y in records])


def with_others(records: list[Record]) -> tuple[Tensor, Tensor, Tensor]:
    x, lengths, labels = by_length(records)
    return x + 0.1 * x.mean(1, keepdim=True), lengths, labels


class Reader(L.LightningModule):
    def __init__(self, mix: Callable[[Tensor, int], Tensor] = lambda state, step: state) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.lstm, self.head = mix, nn.LSTM(4, 5), nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, labels = batch
        x = pad_sequence(x.split(lengths.tolist())) if torch.is_tensor(x) and x.dim() == 2 else x
        _, (state, _) = self.lstm(x if lengths is None else pack_padded_sequence(x, lengths))
        return F.cross_entropy(self.head(self.mix(state[-1], self.trainer.global_step)), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit(module: L.LightningModule, tmp_path: Any, collate: Any = by_length, steps: int = 2, **settings: Any) -> Any:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 3, **settings})
    trainer = make_trainer(strategy, tmp_path, max_steps=steps, max_epochs=-1)
    trainer.fit(module, DataLoader(sequences(), batch_size=6, collate_fn=collate))  # type: ignore[arg-type]
    return strategy


@pytest.mark.parametrize(
    ("collate", "settings"),
    [
        (by_length, {}),
        (by_length, {"microbatch_size": 4}),
        (packed, {}),
        (joined, {}),
        (by_length, {"per_sample_loss": True}),
    ],
)
@pytest.mark.one_in(2)
def test_sorted_records_train_together(
    collate: Any, settings: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """So many steps that some batches are collated again with another record."""
    caplog.set_level(logging.INFO)
    found = []
    for grad_sample in ("auto", "single"):
        module = Reader()
        settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, **settings}
        fit(module, tmp_path, collate, steps=18, grad_sample=grad_sample, **settings)
        found.append(torch.cat([each.detach().flatten() for each in module.parameters()]))
    assert "one at a time" not in caplog.text
    assert "runs alone" not in caplog.text
    torch.testing.assert_close(*found)


def test_sorted_records_that_a_draw_changes_run_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Their values do not tell which row is whose."""

    def moved(records: list[Record]) -> Any:
        x, lengths, labels = by_length(records)
        return x + torch.randn(1), lengths, labels

    caplog.set_level(logging.INFO)
    fit(Reader(), tmp_path, moved)
    assert "one at a time" in caplog.text


def mean_of_others(state: Tensor, step: int) -> Tensor:
    return state - state.mean(0)


def next_record(state: Tensor, step: int) -> Tensor:
    return state + 0.1 * state.roll(1, 0)


def next_record_later(state: Tensor, step: int) -> Tensor:
    return next_record(state, step) if step else state


@pytest.mark.parametrize("mix", [mean_of_others, next_record, next_record_later])
def test_sorted_records_that_meet_are_refused(mix: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="nfluence"):
        fit(Reader(mix), tmp_path)


def test_a_collate_function_that_sorts_and_mixes_is_refused(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="nfluence"):
        fit(Reader(), tmp_path, with_others)


def test_a_collate_function_that_mixes_later_is_refused(tmp_path: Any) -> None:
    trainers: list[L.Trainer] = []

    def collate(records: list[Record]) -> Any:
        is_later = trainers and trainers[0].global_step > 10
        return (with_others if is_later else by_length)(records)

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, seed=3)
    trainers.append(make_trainer(strategy, tmp_path, max_steps=40, max_epochs=-1))
    loader: Any = DataLoader(sequences(), batch_size=6, collate_fn=collate)
    with pytest.raises(PrivacyError, match="nfluence"):
        trainers[0].fit(Reader(), loader)
    assert 10 < strategy.ledger.num_steps < 40


def test_sorted_records_of_users_run_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whose a record is follows from its position."""
    caplog.set_level(logging.INFO)
    fit(Reader(), tmp_path, unit=[i // 2 for i in range(NUM)], records_per_unit=2)
    assert "one at a time" in caplog.text


@each("collate", [by_length, lambda records: [*reversed(records)], lambda records: records])
def test_each_record_has_the_row_of_its_values(collate: Any) -> None:
    order = RowOrder(collate)
    records = sequences()[:7]
    records[1] = (records[0][0][:1], 0)  # the beginning of another one
    assert order.rows_of(records) is None
    order.is_followed = True
    rows = order.rows_of(records)
    assert rows is not None
    batch = collate(records)
    for row, (x, label) in zip(rows.tolist(), records, strict=True):
        if collate is not by_length:
            assert batch[row][1] == label
            continue
        padded, lengths, labels = batch
        assert (int(lengths[row]), int(labels[row])) == (len(x), label)
        assert torch.equal(padded[: len(x), row], x)


@each(
    "collate, num, is_new", [(by_length, 7, False), (by_length, 6, False), (by_value, 7, False), (with_others, 7, True)]
)
def test_a_sorted_record_that_is_exchanged_has_another_row(collate: Any, num: int, is_new: bool) -> None:
    """Six records are as many as the times of the longest one. Users' records may not move."""
    for keeps_order in (False, True):
        _, found = LoadingWatch(keeps_order=keeps_order).collate(collate, sequences()[:num])
        assert (found is not None) == (is_new or keeps_order)
