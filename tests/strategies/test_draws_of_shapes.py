"""Random draws in batches of records of unequal shape: an exchanged record moves the draws of the others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy
from lightning_dp.errors import PrivacyError
from tests.cases import each
from tests.helpers import Classifier, make_loader, make_trainer

HOWS = ["dropout", "noise", "leaks at random"]


class Sets(L.LightningModule):
    """The mean over each set of rows, which random draws have changed."""

    def __init__(self, how: str, *, padded: bool, mixes: bool) -> None:
        super().__init__()
        self.how, self.padded, self.mixes = how, padded, mixes
        self.first, self.last, self.drop = nn.Linear(3, 4), nn.Linear(4, 1), nn.Dropout(0.4)

    def changed(self, rows: Tensor) -> Tensor:
        rows = self.first(rows)
        if self.how == "noise":
            return rows + torch.randn_like(rows)
        return self.drop(rows) if self.how == "dropout" else nn.functional.rrelu(rows, training=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, owner = batch
        rows = self.changed(rows)
        if self.padded:
            mask = (torch.arange(rows.shape[1]) < owner[:, None]).unsqueeze(2)
            means = (rows * mask).sum(1) / owner[:, None]
        else:
            num = int(owner.max()) + 1
            total = rows.new_zeros(num, 4).index_add_(0, owner, rows)
            means = total / torch.bincount(owner, minlength=num)[:, None]
        if self.mixes:
            means = means + 0.01 * float(means.mean())  # a number, whose owners nobody follows
        return self.last(means).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _joined(records: list[Tensor]) -> dict[str, Tensor]:
    counts = torch.tensor([len(record) for record in records])
    return {"rows": torch.cat(records), "sample_of_row": torch.arange(len(records)).repeat_interleave(counts)}


def _padded(records: list[Tensor]) -> tuple[Tensor, Tensor]:
    return pad_sequence(records, batch_first=True), torch.tensor([len(record) for record in records])


class Joined(Sets):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["rows"], batch["sample_of_row"]), batch_idx)


def steps_of_fit(how: str, *, padded: bool, mixes: bool = False) -> int:
    torch.manual_seed(0)
    data = [torch.randn(1 + 7 * number % 40, 3) for number in range(40)]  # an exchange changes the longest, often
    strategy = DPStrategy(noise_multiplier=1.0, grad_sample="rules")
    module = (Sets if padded else Joined)(how, padded=padded, mixes=mixes)
    collate: Any = _padded if padded else _joined
    make_trainer(strategy, None, max_epochs=3).fit(module, DataLoader(data, batch_size=8, collate_fn=collate))
    return strategy.ledger.num_steps


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "joined"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.one_in(6)
def test_draws_beside_records_of_other_shape_train(how: str, padded: bool) -> None:
    assert steps_of_fit(how, padded=padded) == 15


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "joined"])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.one_in(2)
def test_mixing_beside_draws_is_refused(how: str, padded: bool) -> None:
    with pytest.raises(PrivacyError, match="Samples influence each other"):
        steps_of_fit(how, padded=padded, mixes=True)


class Dropped(Sets):
    """Mixes the sets where a real dropout has dropped something, in batches of sets of which no two have one shape."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, lengths = batch
        mask = (torch.arange(words.shape[1]) < lengths[:, None]).unsqueeze(2)
        means = (self.first(nn.functional.one_hot(words, 3).float()) * mask).sum(1) / lengths[:, None]
        drops = nn.functional.dropout(torch.full((64,), 2.0), 0.5) == 0.0
        if self.mixes and bool(drops.any()):
            means = means + 0.01 * float(means.mean())
        return self.last(means).square().mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mixes", [False, True])
def test_mixing_by_real_draws_alone_is_refused(mixes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(3, (2 + number,), generator=generator) for number in range(40)]
    strategy = DPStrategy(noise_multiplier=1.0)
    trainer = make_trainer(strategy, None)
    with pytest.raises(PrivacyError, match="given one row in all places") if mixes else nullcontext():
        loader: Any = DataLoader(data, batch_size=8, collate_fn=_padded)
        trainer.fit(Dropped("dropout", padded=True, mixes=mixes), loader)
    assert strategy.ledger.num_steps == (0 if mixes else 5)


class Gated(Sets):
    """Draws for the rows whose first word is 0 alone: as many draws as a record has such rows."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, _ = batch
        rows = self.first(nn.functional.one_hot(words, 3).float())
        zero = words == 0
        rows[zero] = nn.functional.dropout(rows[zero], 0.5)
        means = rows.mean(1)
        return self.last(means + 0.01 * float(means.mean()) if self.mixes else means).square().mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mixes", [False, True])
def test_as_many_draws_as_a_record_asks_for_are_no_coupling(mixes: bool) -> None:
    data = [torch.randint(3, (6,), generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    strategy = DPStrategy(noise_multiplier=1.0, grad_sample="rules")
    with pytest.raises(PrivacyError, match="Samples influence each other") if mixes else nullcontext():
        loader: Any = DataLoader(data, batch_size=8, collate_fn=_padded)
        make_trainer(strategy, None).fit(Gated("dropout", padded=True, mixes=mixes), loader)
    assert strategy.ledger.num_steps == (0 if mixes else 5)


class Seeds(L.LightningModule):
    """Adds noise whose seed is the number of the batch, or is made of its records."""

    def __init__(self, *, of_records: bool) -> None:
        super().__init__()
        self.layer, self.of_records = nn.Linear(3, 1), of_records

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(int(batch.abs().sum() * 1000) if self.of_records else batch_idx)
        return self.layer(batch + torch.randn_like(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("of_records", [False, True])
def test_a_seed_that_is_made_of_records_is_refused(of_records: bool) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), None)
    loader: Any = DataLoader(torch.randn(32, 3), batch_size=8)  # type: ignore[arg-type]
    refused = pytest.raises(PrivacyError, match="leaves 'the seed of torch' with another value")
    with refused if of_records else nullcontext():
        trainer.fit(Seeds(of_records=of_records), loader)


class Switched(Seeds):
    """Drops out where the mean of the batch is above zero."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = nn.functional.dropout(batch, 0.5, training=bool(batch.mean() > 0))
        return self.layer(batch).square().mean()


def test_a_dropout_that_the_batch_switches_on_is_refused() -> None:
    torch.manual_seed(0)
    loader: Any = DataLoader(torch.randn(32, 3), batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="One sample of a batch was made huge"):
        make_trainer(DPStrategy(noise_multiplier=1.0), None).fit(Switched(of_records=False), loader)


class Sorted(Seeds):
    """Sorts the rows by their sums for random draws, and puts them back."""

    def __init__(self, draw: Any) -> None:
        super().__init__(of_records=False)
        self.draw, self.lstm = draw, nn.LSTM(3, 1, 2, dropout=0.4, batch_first=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        order = batch.sum(1).argsort()
        return self.layer(self.draw(self, batch[order]))[order.argsort()].square().mean()


def _packed(module: Sorted, rows: Tensor) -> Tensor:
    lengths = 1 + (rows > 0).sum(1)
    packed = nn.utils.rnn.pack_padded_sequence(rows[:, None].repeat(1, 4, 1), lengths, True, enforce_sorted=False)
    return rows * nn.utils.rnn.pad_packed_sequence(module.lstm(packed)[0], batch_first=True)[0].sum((1, 2))[:, None]


def _rate(module: Sorted, rows: Tensor) -> Tensor:
    return nn.functional.dropout(rows, 0.2 + 0.4 * float(rows[0].sigmoid().mean()))


SORTED = [
    (lambda module, rows: nn.functional.dropout(rows, 0.4), None),
    (lambda module, rows: nn.functional.dropout1d(rows[:, :, None].repeat(1, 1, 2), 0.4).sum(2), None),
    (_packed, None),
    (_rate, "Samples influence each other"),
    (lambda module, rows: rows + torch.randn_like(rows), "draw before the rows are sorted"),
]


@each("draw, cause", SORTED)
@pytest.mark.slow
def test_dropout_of_sorted_rows_trains_and_mixing_does_not(draw: Any, cause: str | None) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    loader: Any = DataLoader(torch.randn(40, 3), batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=cause) if cause else nullcontext():
        make_trainer(strategy, None).fit(Sorted(draw), loader)
    assert strategy.ledger.num_steps == (0 if cause else 5)


class Partners(Seeds):
    """Replaces or changes some rows by others that random draws choose."""

    def __init__(self, draw: Any) -> None:
        super().__init__(of_records=False)
        self.draw = draw

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(self.draw(batch)).square().mean()


def _swapped(rows: Tensor) -> Tensor:
    return torch.where(nn.functional.dropout(torch.ones(len(rows), 1), 0.05) == 0, rows.roll(1, 0), rows)


@each("draw", [_swapped, lambda rows: rows + rows[torch.rand(len(rows)).argsort()]])
def test_partners_by_a_dropout_or_an_order_are_refused(draw: Any) -> None:
    loader: Any = DataLoader(torch.randn(40, 3), batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="partners that are drawn at random"):
        make_trainer(DPStrategy(noise_multiplier=1.0), None).fit(Partners(draw), loader)


class Copies(Classifier):
    """Sees every record three times, one copy of all records after the other, each with noise of its own."""

    def __init__(self, *, shares: bool) -> None:
        super().__init__()
        self.shares = shares

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        copies = batch[0].repeat(3, 1)
        losses = nn.functional.cross_entropy(
            self(copies + torch.randn_like(copies)), batch[1].repeat(3), reduction="none"
        )
        weights = torch.rand(len(copies)) + 0.5
        return (losses * weights).sum() / weights.sum() if self.shares else (losses * weights).mean()


@pytest.mark.parametrize("shares", [False, True])
def test_copies_one_after_the_other_get_their_own_draws(tmp_path: Any, shares: bool) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, grad_sample="rules")
    with pytest.raises(PrivacyError, match="only where random draws differ") if shares else nullcontext():
        make_trainer(strategy, tmp_path).fit(Copies(shares=shares), make_loader())
    assert strategy.ledger.num_steps == (0 if shares else 4)
