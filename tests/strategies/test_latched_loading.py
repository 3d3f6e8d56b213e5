"""Variables and attributes that a collate function or a dataset sets, when certain records come, and a loss reads."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.loop import make_private
from tests.helpers import make_trainer
from tests.strategies.test_latched_state import RARE, STEPS, Module, loader

FACTOR, CALLS = 1.0, 0
LAST: list[Any] = []
IN_ORDER = loader
REFUSED = "differs after (the records of a batch|another record)|influence each other|its gradient when run alone"


class Reads(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * FACTOR


class ReadsTheData(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data: Any = self.trainer.datamodule
        return super().training_step(batch, batch_idx) * data.factor


def sets_for_good(records: list[Any]) -> Any:
    global FACTOR
    FACTOR = 0.5 if any((words == RARE).any() for words, _ in records) else FACTOR
    return default_collate(records)


def sets_each_time(records: list[Any]) -> Any:
    global FACTOR
    FACTOR = 0.5 if any((words == RARE).any() for words, _ in records) else 1.0
    return default_collate(records)


class SetsAsItReads(Dataset[Any]):
    def __init__(self) -> None:
        self.records: Any = loader().dataset

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        global FACTOR
        words, label = self.records[index]
        FACTOR = 0.5 if (words == RARE).any() else FACTOR
        return words, label


class Data(L.LightningDataModule):
    factor = 1.0

    def collate(self, records: list[Any]) -> Any:
        if any((words == RARE).any() for words, _ in records):
            self.factor = 0.5
        return default_collate(records)

    def train_dataloader(self) -> Any:
        return DataLoader(loader().dataset, batch_size=8, collate_fn=self.collate)


class Keeps(Module):
    """What its loader keeps is read by no step."""


def keeps(records: list[Any]) -> Any:
    global CALLS
    CALLS += 1
    LAST[:] = [default_collate(records)]
    return default_collate(records)


@pytest.fixture(autouse=True)
def _reset() -> None:
    global FACTOR, CALLS
    FACTOR, CALLS = 1.0, 0
    LAST.clear()


def collated_by(function: Any) -> Any:
    return DataLoader(loader().dataset, batch_size=8, collate_fn=function)


def sees_the_rare(records: list[Any]) -> Any:
    """As ``sets_each_time`` does, but nothing notes what it reads from an array."""
    global FACTOR
    batch = default_collate(records)
    FACTOR = -1.0 if (batch[0].numpy() == RARE).any() else 1.0
    return batch


def rare_comes_last() -> Any:
    """The rare record is in the last microbatch of each batch that it is in."""
    return DataLoader(Subset(IN_ORDER().dataset, [*range(7), *range(8, 32), 7]), batch_size=8)


def all_at_once() -> Any:
    return DataLoader(rare_comes_last().dataset, batch_size=32, collate_fn=sees_the_rare)


WAYS = {
    "collate function, for good": lambda: (Reads(), collated_by(sets_for_good)),
    "collate function, each time": lambda: (Reads(), collated_by(sets_each_time)),
    "dataset": lambda: (Reads(), DataLoader(SetsAsItReads(), batch_size=8)),
    "data module": lambda: (ReadsTheData(), Data()),
}


def fit(module: Any, data: Any, tmp_path: Any, seed: int = 0, **options: Any) -> int:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, seed=seed, **options)
    make_trainer(strategy, tmp_path, max_steps=STEPS, max_epochs=-1).fit(module, data)
    return strategy.ledger.num_steps


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.one_in(2)
def test_what_loading_sets_for_a_rare_record_is_refused(name: str, seed: int, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(*WAYS[name](), tmp_path, seed)


@pytest.mark.parametrize("options", [{"grad_sample": "single"}, {"microbatch_size": 3}], ids=str)
@pytest.mark.parametrize("name", ["collate function, for good", "dataset", "data module"])
@pytest.mark.one_in(3)
def test_what_the_last_microbatch_sets_is_refused(
    name: str, options: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.strategies.test_latched_loading.loader", rare_comes_last)
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(*WAYS[name](), tmp_path, **options)


class Sees(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.where((batch[0] == RARE).any(), -1.0, 1.0)


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_microbatch_runs_with_what_its_own_records_set(in_loop: bool, tmp_path: Any) -> None:
    def released(kind: type[Module]) -> list[Tensor]:
        torch.manual_seed(0)
        module, data = kind(), all_at_once()
        options: Any = {"noise_multiplier": 0.0, "target_delta": 1e-3, "grad_sample": "single", "seed": 0}
        if not in_loop:
            make_trainer(DPStrategy(**options), tmp_path, max_steps=2, max_epochs=-1).fit(module, data)
            return [each.detach() for each in module.parameters()]
        optimizer = module.configure_optimizers()
        with make_private(
            module, optimizer, data, lambda model, batch: model.training_step(batch, 0), steps=2, **options
        ) as private:
            for batch in (batch for _ in range(2) for batch in private.loader):
                private.step(batch)
        return [each.detach() for each in module.parameters()]

    torch.testing.assert_close(released(Reads), released(Sees))


def test_all_microbatches_are_checked_where_one_has_set_a_value() -> None:
    words = torch.randint(0, RARE, (300, 4), generator=torch.Generator().manual_seed(0))
    words[166, 2] = RARE  # in the last microbatch of the second batch
    data = DataLoader(TensorDataset(words, words[:, 0] % 3), batch_size=8, collate_fn=sees_the_rare)
    model = nn.Sequential(nn.Embedding(20, 3), nn.Flatten(), nn.Linear(12, 3))
    with make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]) * FACTOR, batch[1]),
        steps=2,
        seed=3,
        noise_multiplier=1.0,
        microbatch_size=3,
    ) as private:
        batches = iter(private.loader)
        private.step(next(batches))
        with pytest.raises(PrivacyError, match="its gradient when run alone"):
            private.step(next(batches))


class CountsReads(Dataset[Any]):
    def __init__(self) -> None:
        self.records = loader().dataset

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        global CALLS
        CALLS += 1
        return self.records[index]


class NamesTheCount(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 if CALLS >= 0 else 0.0)


def test_only_reading_for_a_step_sets_something(tmp_path: Any) -> None:
    """Records at public positions are read for trials, and in place of batches that are empty."""
    sizes: list[int] = []

    class Sizes(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            sizes.append(len(batch[0]))

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, seed=0, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, max_steps=STEPS, max_epochs=-1, callbacks=[Sizes()])
    trainer.fit(NamesTheCount(), DataLoader(CountsReads(), batch_size=1))
    assert sum(sizes) == CALLS
    assert 0 in sizes


def test_what_the_first_batch_of_a_loop_sets_is_refused() -> None:
    module, data = Module(), DataLoader(loader().dataset, batch_size=32, collate_fn=sets_for_good)
    options: Any = {"noise_multiplier": 1.0, "target_delta": 1e-3, "steps": 1}
    with (
        make_private(
            module,
            module.configure_optimizers(),
            data,
            lambda model, batch: model.training_step(batch, 0) * FACTOR,
            **options,
        ) as private,
        pytest.raises(PrivacyError, match=REFUSED),
    ):
        private.step(next(iter(private.loader)))


def test_what_loading_sets_in_a_loop_is_refused() -> None:
    module = Module()
    optimizer, options = torch.optim.SGD(module.parameters(), lr=0.1), {"noise_multiplier": 1.0, "target_delta": 1e-3}
    data = collated_by(sets_for_good)
    private = make_private(
        module, optimizer, data, lambda model, batch: model.training_step(batch, 0) * FACTOR, steps=STEPS, **options
    )

    def train() -> None:
        for batch in (batch for _ in range(STEPS) for batch in private.loader):
            private.step(batch)

    with private, pytest.raises(PrivacyError, match=REFUSED):
        train()


def test_what_only_loading_reads_is_free(tmp_path: Any) -> None:
    assert fit(Keeps(), collated_by(keeps), tmp_path) == STEPS
    assert CALLS >= STEPS
    assert len(LAST[0][0]) <= 16  # of a real batch
