"""User-level privacy under a Trainer and in a loop: users are drawn, clipped once, counted and stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dp import DPStrategy, GradientDiagnostics, PrivacyAudit, PrivacyCard, RandomSparsification, make_private
from lightning_dp.auditing import random_records
from lightning_dp.callbacks import EpsilonMonitor
from lightning_dp.errors import PrivacyError
from lightning_dp.noise import CorrelatedNoise
from tests.helpers import NUM_FEATURES, NUM_RECORDS, Classifier, make_dataset, make_loader, make_trainer

#: 64 records of 16 users: 1, 7, 1, 7, ... records each.
IDS = [f"user {2 * (record // 8) + (record % 8 > 0)}" for record in range(NUM_RECORDS)]


def fit(tmp_path: Any, *, data: Any = None, batch_size: int = 4, trainer: Any = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 1}
    strategy = DPStrategy(**{**defaults, "check_per_sample": False, **options})
    module = Classifier()
    made = make_trainer(strategy, tmp_path, max_epochs=2, **(trainer or {}))
    made.fit(module, DataLoader(data or make_dataset(), batch_size=batch_size))
    return strategy, torch.cat([p.detach().flatten() for p in module.parameters()])


def test_users_are_what_is_counted_and_stated(tmp_path: Any) -> None:
    card = PrivacyCard()
    options = {"callbacks": [card, EpsilonMonitor()], "logger": L.pytorch.loggers.CSVLogger(tmp_path)}
    strategy, _ = fit(tmp_path, unit=IDS, records_per_unit=3, trainer=options, check_per_sample=True)
    plan = strategy.plan
    assert (plan.dataset_size, plan.expected_batch_size, plan.sample_rate, plan.steps) == (16, 4, 0.25, 8)
    text = strategy.privacy_statement()
    assert "for adding or removing all records of one user" in text
    assert "unit: one user with all its records, of which at most 3 join a batch (16 users)" in text
    assert "expected batch size: 4 users" in text
    written = next(tmp_path.rglob("privacy_card.md")).read_text()
    assert "one user with all its records" in written
    assert "each user joins each batch independently" in written
    assert "whether one user was used" in written
    assert "record was used" not in written


@pytest.mark.slow
def test_one_record_per_user_trains_as_records_do(tmp_path: Any) -> None:
    _, plain = fit(tmp_path)
    strategy, users = fit(tmp_path, unit=list(range(NUM_RECORDS)), records_per_unit=1, check_per_sample=True)
    torch.testing.assert_close(users, plain, rtol=0.0, atol=1e-6)  # small gradients are summed in another order
    assert strategy.ledger.unit == "user"


def test_twice_the_records_of_every_user_change_no_epsilon(tmp_path: Any) -> None:
    """Nor the weights, since the mean over a user's records stays and all of them join."""
    once, twice = make_dataset(), torch.arange(NUM_RECORDS).repeat_interleave(2)
    data = TensorDataset(*(tensor[twice] for tensor in once.tensors))
    first = fit(tmp_path, unit=IDS, records_per_unit=99)
    second = fit(tmp_path, data=data, unit=[IDS[record] for record in twice], records_per_unit=99)
    assert first[0].epsilon() == second[0].epsilon()
    torch.testing.assert_close(first[1], second[1], rtol=1e-4, atol=1e-5)
    summed = fit(tmp_path, unit=IDS, records_per_unit=99, unit_gradient="sum")[1]
    assert float((summed - first[1]).norm()) > 1e-3


@pytest.mark.parametrize("unit_gradient", ["mean", "sum"])
@pytest.mark.one_in(2)
def test_microbatches_of_any_size_give_the_same_users(tmp_path: Any, unit_gradient: str) -> None:
    found = [
        fit(tmp_path, unit=IDS, records_per_unit=5, unit_gradient=unit_gradient, microbatch_size=size)[1]
        for size in (None, 6, 1)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


class Items(Dataset):
    """Mappings that hold the id of their user."""

    def __len__(self) -> int:
        return NUM_RECORDS

    def __getitem__(self, index: int) -> dict[str, Any]:
        features, label = make_dataset()[index]
        return {"features": features, "label": label, "user": IDS[index]}


class ItemClassifier(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch["features"], batch["label"]), batch_idx)


class Data(L.LightningDataModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "attribute":
            self.unit_ids = IDS
        elif how == "method":
            self.unit_ids = lambda: IDS

    def train_dataloader(self) -> Any:
        return make_loader(batch_size=4)


@pytest.mark.parametrize("how", ["attribute", "method"])
@pytest.mark.one_in(2)
def test_a_datamodule_gives_the_ids(tmp_path: Any, how: str) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, records_per_unit=2)
    make_trainer(strategy, tmp_path, max_steps=1).fit(Classifier(), datamodule=Data(how))
    assert strategy.plan.dataset_size == 16


def test_a_datamodule_without_ids_is_refused(tmp_path: Any) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, records_per_unit=2), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="Expected a unit with records_per_unit=2, got unit=None"):
        trainer.fit(Classifier(), datamodule=Data("nothing"))


def test_a_key_of_the_items_gives_the_ids(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, unit="user", records_per_unit=2)
    with pytest.warns(UserWarning, match="Reading all 64 records once"):
        make_trainer(strategy, tmp_path, max_steps=1).fit(ItemClassifier(), DataLoader(Items(), batch_size=4))
    assert strategy.plan.dataset_size == 16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unit": IDS}, "Expected records_per_unit with a unit"),
        ({"unit": IDS, "records_per_unit": 0}, "records_per_unit"),
        ({"unit_gradient": "sum"}, "Expected unit_gradient with a unit"),
        ({"unit": IDS, "records_per_unit": 1, "unit_gradient": "max"}, "unit_gradient"),
    ],
)
def test_settings_of_users_are_checked(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DPStrategy(noise_multiplier=1.0, **options)


def test_a_resumed_run_goes_on_with_the_same_unit(tmp_path: Any) -> None:
    """Epsilon is that of the uninterrupted run; a checkpoint or a history of records is no history of users."""
    users = {"noise_multiplier": 1.0, "unit": IDS, "records_per_unit": 2, "target_delta": 1e-3}
    whole = DPStrategy(**users, check_per_sample=False)
    make_trainer(whole, tmp_path, max_epochs=2).fit(Classifier(), make_loader(batch_size=4))
    trainer = make_trainer(DPStrategy(**users, check_per_sample=False), tmp_path, max_epochs=1)
    trainer.fit(Classifier(), make_loader(batch_size=4))
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    resumed = DPStrategy(**users)
    make_trainer(resumed, tmp_path, max_epochs=2).fit(
        Classifier(), make_loader(batch_size=4), ckpt_path=path, weights_only=True
    )
    assert resumed.epsilon() == whole.epsilon()
    for options in ({"history": path}, {"history": resumed.ledger}):
        with pytest.raises(PrivacyError, match="Expected a history that protects each record"):
            DPStrategy(noise_multiplier=1.0, **options)
    other = make_trainer(DPStrategy(noise_multiplier=1.0, target_delta=1e-3), tmp_path, max_epochs=2)
    with pytest.raises(PrivacyError, match="that protects each record, got one that protects each user"):
        other.fit(Classifier(), make_loader(batch_size=4), ckpt_path=path, weights_only=True)


def test_callbacks_that_look_at_samples_look_at_users(tmp_path: Any) -> None:
    """Input canaries join as users of their own; masks and diagnostics run."""
    canaries = random_records(make_dataset()[0], 8, num_classes=3)
    audit = PrivacyAudit(canaries=canaries)
    callbacks = [audit, RandomSparsification(final_rate=0.5), GradientDiagnostics()]
    strategy, _ = fit(tmp_path, unit=IDS, records_per_unit=2, trainer={"callbacks": callbacks})
    assert strategy.plan.dataset_size == 16 + int(audit.included.sum())
    assert audit.result is not None


def test_a_loop_protects_users(tmp_path: Any) -> None:
    strategy, trained = fit(tmp_path, unit=IDS, records_per_unit=3, microbatch_size=6)
    module = Classifier()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 1}
    with make_private(
        module,
        optimizer,
        DataLoader(make_dataset(), batch_size=4),
        lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
        epochs=2,
        unit=IDS,
        records_per_unit=3,
        microbatch_size=6,
        **options,
    ) as private:
        for _ in range(2):
            for batch in private.loader:
                private.step(batch)
    assert private.epsilon() == strategy.epsilon()
    assert "all records of one user" in private.privacy_statement()
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in module.parameters()]), trained)


class InOrder(Dataset[Any]):
    """Records by way of an order; ``shuffles`` is called by some module between two passes."""

    def __init__(self) -> None:
        self.features, self.labels = make_dataset().tensors
        self.order = list(range(len(self.labels)))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        place = self.order[index]
        return self.features[place] + torch.randn(NUM_FEATURES), self.labels[place]

    def shuffles(self) -> None:
        self.order = self.order[1:] + self.order[:1]


@pytest.mark.parametrize(
    "options",
    [
        {"unit": [record // 4 for record in range(NUM_RECORDS)], "records_per_unit": 2},
        {"sampling": "cyclic", "noise": CorrelatedNoise(), "neighboring_relation": "zero_out"},
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.one_in(4)
def test_records_that_change_places_are_refused(options: dict[str, Any], shuffled: bool, tmp_path: Path) -> None:
    dataset = InOrder()

    class Shuffles(Classifier):
        def on_train_epoch_start(self) -> None:
            if shuffled:
                dataset.shuffles()

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, **options)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    if not shuffled:
        trainer.fit(Shuffles(), DataLoader(dataset, batch_size=4))
        return
    with pytest.raises(PrivacyError, match="Expected records to keep their positions"):
        trainer.fit(Shuffles(), DataLoader(dataset, batch_size=4))
