"""Collate functions, hooks and items that begin to mix records after some steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_dp import PrivacyError
from tests.strategies.test_later_couplings import PLANNED, Module, loader, seeded, trainer


class Collate:
    """Begins, with a call, to mix the rows of a batch; the random draws are those of the loader."""

    def __init__(self, what: str, begins: int) -> None:
        self.what, self.begins, self.calls = what, begins, 0

    def __call__(self, records: list[Any]) -> Any:
        self.calls += 1
        rows = np.stack([np.asarray(row) for (row,) in records])
        if self.calls > self.begins and self.what == "mean":
            rows = rows - rows.mean(0)
        elif self.calls > self.begins and self.what == "pairs":
            rows = 0.5 * (rows + np.roll(rows, 1, 0))
        elif self.calls > self.begins:  # of each row by itself
            rows = 0.5 * rows + 0.1 * torch.randn(rows.shape).numpy()
        return [torch.as_tensor(rows)], {"number": torch.tensor(len(rows)), "sum": torch.tensor(rows.sum())}


class Collated(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


def fit_collated(what: str, begins: int = 12, *, num_workers: int = 0, automatic: bool = True) -> tuple[int, Any]:
    strategy = seeded()
    module, collate = Collated(automatic=automatic), Collate(what, begins)
    more: Any = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    data = DataLoader(loader().dataset, batch_size=10, collate_fn=collate, **more)
    with nullcontext() if what == "rows" else pytest.raises(PrivacyError, match=r"exchanged for another(?!.*released)"):
        trainer(strategy).fit(module, data)
    return strategy.steps_taken, collate


@pytest.mark.parametrize("what", ["mean", "pairs"])
@pytest.mark.one_in(2)
def test_a_collation_that_begins_to_mix_is_refused(what: str) -> None:
    assert fit_collated(what)[0] == 16
    assert fit_collated(what, automatic=False)[0] == 16


@pytest.mark.parametrize(("num_workers", "steps"), [(1, 16), (2, 16)])
@pytest.mark.one_in(2)
def test_mixing_in_workers_is_refused(num_workers: int, steps: int) -> None:
    """A worker of two watches one of eight batches; each begins to mix with its seventh."""
    assert fit_collated("pairs", 12 // num_workers, num_workers=num_workers)[0] == steps


@pytest.mark.slow
def test_collation_of_single_rows_trains() -> None:
    steps, collate = fit_collated("rows")
    assert steps == PLANNED
    assert PLANNED - 1 <= collate.calls <= PLANNED  # not if no record was drawn


@pytest.mark.slow
def test_entropy_of_the_system_is_no_coupling() -> None:
    """Each call draws otherwise, and a hook of the transfer lets exchanges be looked at after it."""

    class Moves(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    def collate(records: list[Any]) -> Any:
        rows = torch.stack([row for (row,) in records])
        noise = np.random.default_rng().normal(size=rows.shape) if strategy.steps_taken >= 12 else 0.0
        return [rows + torch.as_tensor(noise, dtype=rows.dtype)]

    strategy = seeded()
    module = Moves()
    trainer(strategy).fit(module, DataLoader(loader().dataset, batch_size=10, collate_fn=collate))
    assert strategy.steps_taken == PLANNED


def test_without_checks_nothing_is_watched() -> None:
    class Always(Items):
        begun = True

    strategy = seeded(check_per_sample=False)
    module = Module()
    trainer(strategy).fit(
        module, DataLoader(Always(), batch_size=10, collate_fn=lambda records: Collate("rows", 0)(records)[0])
    )
    assert strategy.steps_taken == PLANNED


def test_a_hook_that_begins_to_mix_by_numpy_is_refused() -> None:
    class Centred(Module):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            if self.trainer.global_step < 12:
                return batch
            return [torch.as_tensor(batch[0].numpy() - batch[0].numpy().mean(0))]

    strategy = seeded()
    with pytest.raises(PrivacyError, match="when run alone"):
        trainer(strategy).fit(Centred(), loader())
    assert strategy.steps_taken == 12


class Items(Dataset[Any]):
    """Adds the last row that was read to a row, from a read on that comes after the first checks."""

    begun = False

    def __init__(self) -> None:
        self.rows, self.last = loader().dataset.tensors[0], torch.zeros(4)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row, self.last = self.rows[index] + self.begun * self.last, self.rows[index]
        return [row]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.one_in(2)
def test_items_that_begin_to_mix_are_refused(num_workers: int) -> None:
    class Begins(Items):
        num_reads = 0

        def __getitem__(self, index: int) -> Any:
            self.num_reads += 1
            self.begun = self.num_reads > 120 if get_worker_info() else not num_workers and strategy.steps_taken >= 12
            return super().__getitem__(index)

    strategy = seeded()
    module = Module()
    data = DataLoader(Begins(), batch_size=10, num_workers=num_workers, persistent_workers=num_workers > 0)
    with pytest.raises(PrivacyError, match="it was another one after other items were read"):
        trainer(strategy).fit(module, data)
    assert strategy.steps_taken == 16
