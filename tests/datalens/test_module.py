"""DataLens under a Trainer, as a user meets it: epsilon, budgets, checkpoints, what is released and what is not."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_dp import DPStrategy, Epsilon, EpsilonMonitor, PrivacyBudget, PrivacyError
from lightning_dp.datalens import DataLens, MLPGenerator, StepsOver, epsilon_after
from lightning_dp.datalens.trainer_checks import check_trainer
from tests.datalens.helpers import fit, make_model, make_records
from tests.helpers import make_trainer


def spent(steps: int, sigma: float = 3.0) -> float:
    return epsilon_after(steps, sigma=sigma, top_k=2, batch_size=4, delta=1e-5)


@pytest.mark.parametrize("batch_size", [5, 7])
def test_one_ledger_entry_a_step_with_any_loader(tmp_path: Path, batch_size: int) -> None:
    model = make_model()
    trainer = fit(model, tmp_path, loader=DataLoader(make_records(), batch_size=batch_size, shuffle=True), max_epochs=2)
    steps = 2 * -(-60 // batch_size)
    assert model.ledger.num_steps == model.steps_taken == trainer.global_step == steps
    assert model.ledger.neighboring_relation == "replace_one"
    (entry,) = model.ledger.entries
    assert (entry.event.kind, entry.event.sample_rate) == ("gaussian", 1.0)
    assert model.epsilon() == pytest.approx(spent(steps), rel=1e-9)
    assert float(Epsilon(model, delta=1e-5).compute()) == pytest.approx(spent(steps), rel=1e-6)
    for text in (f"epsilon={model.epsilon():.3g}"[:10], "replacing one record", "6 teachers with 10 each"):
        assert text in model.privacy_statement()


def test_monitor_logs_epsilon_first(tmp_path: Path) -> None:
    model = make_model()
    monitor = EpsilonMonitor(every_n_steps=3)
    trainer = fit(model, tmp_path, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[monitor])
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()))
    logged = [(int(row["step"]), float(row["epsilon"])) for row in rows if row["epsilon"]]
    assert logged == [(step - 1, pytest.approx(spent(step), rel=1e-5)) for step in (1, 4, 7, 8)]
    assert float(trainer.callback_metrics["privacy/noise_multiplier"]) == pytest.approx(3 / (2 * 8**0.5))
    names = {"epoch", "step", "epsilon", "privacy/delta", "privacy/noise_multiplier", "datalens/agreed"}
    assert set(rows[0]) == names
    assert all(0 <= float(row["datalens/agreed"]) <= 1 for row in rows if row["datalens/agreed"])


@pytest.mark.parametrize("allowed", [1, 3, 6])
def test_budget_stops_before_the_step_that_would_exceed_it(tmp_path: Path, allowed: int) -> None:
    budget = (spent(allowed) + spent(allowed + 1)) / 2
    model = make_model()
    trainer = fit(model, tmp_path, max_epochs=5, callbacks=[PrivacyBudget(budget)])
    assert model.ledger.num_steps == trainer.global_step == allowed
    assert model.epsilon() <= budget
    assert math.isinf(model.last_allowed_step)


def test_budget_holds_where_the_trainer_may_not_stop(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(PrivacyError, match="stop after 6 steps"):
        fit(model, tmp_path, max_epochs=5, min_epochs=3, callbacks=[PrivacyBudget((spent(6) + spent(7)) / 2)])
    assert model.ledger.num_steps == 6


@pytest.mark.parametrize("limits", [{"max_steps": 7}, {"max_epochs": 3}, {"max_epochs": 4, "limit_train_batches": 2}])
def test_target_epsilon_picks_sigma_for_the_planned_steps(tmp_path: Path, limits: dict[str, Any]) -> None:
    model = make_model(target_epsilon=2.0)
    fit(model, tmp_path, **limits)
    assert 1.98 <= model.epsilon() <= 2.0
    sigma = model.plan.noise_std
    assert model.epsilon() == pytest.approx(spent(model.ledger.num_steps, sigma), rel=1e-9)


def test_target_epsilon_needs_a_bounded_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bounded run with target_epsilon"):
        fit(make_model(target_epsilon=2.0), tmp_path, max_epochs=-1)


def test_cost_is_said_before_any_noise_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    said: list[str] = []
    original = DataLens.training_step

    def stepping(self: DataLens, *args: Any) -> None:
        said.extend(record.getMessage() for record in caplog.records)
        return original(self, *args)

    monkeypatch.setattr(DataLens, "training_step", stepping)
    with caplog.at_level("INFO", logger="lightning.fabric.utilities.rank_zero"):
        fit(model, tmp_path, max_steps=3)
    assert any(f"epsilon={spent(3):.4g} at delta=1e-05 after 3 steps" in message for message in said)


class Line(nn.Module):
    """A generator whose samples are its one parameter, so that steps can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(3))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.row.expand(len(z), 3)


def descend(tmp_path: Path, **options: Any) -> tuple[DataLens, list[Tensor]]:
    """One step of plain gradient descent whose length makes the sample move by alpha times the mean direction."""
    directions: list[Tensor] = []

    class Watching(DataLens):
        def _noisy_votes(self, samples: Tensor, labels: Tensor) -> Tensor:
            noisy = super()._noisy_votes(samples, labels)
            directions.append(noisy.clone())
            return noisy

    model = make_model(**options)
    model.__class__ = Watching
    model.generator = Line()
    model._make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.5)  # d/drow MSE = -2 alpha mean(u) / 3
    fit(model, tmp_path, max_steps=1)
    return model, directions


def test_the_generator_moves_along_the_thresholded_votes(tmp_path: Path) -> None:
    """Six voters without noise: a coordinate moves only where more than three of them agree on balance."""
    model, (votes,) = descend(
        tmp_path, sigma=0.0, threshold=0.5, alpha=0.1, top_k=3, pretrain_steps=10, teacher_lr=0.05
    )
    assert set(votes.unique().tolist()) <= {-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0}
    direction = torch.where(votes.abs() > 3, votes.sign(), 0.0)
    assert float(direction.abs().mean()) > 0
    torch.testing.assert_close(model.generator.row.detach(), 0.1 * direction.mean(0))
    assert model.epsilon() == float("inf")
    assert "not private" in model.privacy_statement()


def test_noise_is_not_what_a_seed_predicts(tmp_path: Path) -> None:
    """The same public seed and the same global seed: other noise. With seed= (tests only) the same."""
    seen = []
    for seed in (None, None, 3, 3):
        torch.manual_seed(0)
        seen.append(descend(tmp_path, sigma=1e4, seed=seed)[1][0])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    correlation = torch.corrcoef(torch.stack([seen[0].flatten(), seen[1].flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.99


def test_generate_follows_labels_and_leaves_the_mode(tmp_path: Path) -> None:
    model = make_model()
    features, labels = model.generate(2500, generator=torch.Generator().manual_seed(0))
    assert features.shape == (2500, 3)
    assert set(labels.tolist()) == {0, 1}
    assert not features.requires_grad
    assert model.generator.training
    assert model.generate(3, 1)[1].tolist() == [1, 1, 1]
    wanted = torch.tensor([0, 1, 1])
    assert torch.equal(model.generate(3, wanted)[1], wanted)
    for labels in (2, -1, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="labels from 0 to 1"):
            model.generate(3, labels)


def test_samples_are_written_by_suffix(tmp_path: Path) -> None:
    model = make_model()
    model.save_samples(tmp_path / "rows.csv", 5, columns=["a", "b", "c"])
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == "a,b,c,label"
    model.save_samples(tmp_path / "rows.pt", 5, 1)
    assert torch.load(tmp_path / "rows.pt", weights_only=True)["labels"].tolist() == [1] * 5


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_records())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=5), "map-style dataset, got Stream"),
        (lambda: [DataLoader(make_records()), DataLoader(make_records())], "one training DataLoader"),
        (lambda: DataLoader(make_records(), sampler=SubsetRandomSampler(range(9))), "got a SubsetRandomSampler"),
        (lambda: DataLoader(make_records(), sampler=WeightedRandomSampler([1.0] * 60, 60)), "got a Weighted"),
        (lambda: StepsOver(make_records(5), 4), "num_teachers <= 5"),
    ],
)
def test_loaders_that_hide_or_weigh_records_are_refused(tmp_path: Path, loader: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make_model(), tmp_path, loader=loader(), max_steps=1)


class Folded(Dataset[Any]):
    def __init__(self) -> None:
        self.records = make_records()

    def __len__(self) -> int:
        return 2 * len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index % len(self.records)]


class Mean:
    """A collate function that subtracts a mean of the records before."""

    mean: Any = 0.0

    def __call__(self, records: list[Any]) -> Any:
        features, labels = default_collate(records)
        self.mean = 0.5 * self.mean + 0.5 * features.mean(0)
        return features - self.mean, labels


@pytest.mark.parametrize(
    ("dataset", "collate", "message"),
    [
        (ConcatDataset([make_records()] * 2), None, "Expected each record once"),
        (Folded(), None, "each record at one position"),
        (make_records(), Mean(), "A record was collated after another one"),
    ],
    ids=["joined", "folded", "mean"],
)
def test_records_in_several_shards_are_refused(tmp_path: Path, dataset: Any, collate: Any, message: str) -> None:
    with pytest.raises((ValueError, PrivacyError), match=message):
        fit(make_model(), tmp_path, loader=DataLoader(dataset, batch_size=5, collate_fn=collate), max_steps=1)


@pytest.mark.parametrize(
    ("options", "model_options", "message"),
    [
        ({"precision": "16-true"}, {}, "precision='16-true'"),
        ({"gradient_clip_val": 1.0}, {}, "gradient_clip_val"),
        ({}, {"top_k": 4}, "top_k <= 3"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, options: dict[str, Any], model_options: dict[str, Any], message: str
) -> None:
    model = make_model(**model_options)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(model, tmp_path, max_steps=1, **options)
    assert model.ledger.num_steps == 0


def test_a_generator_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.generator = MLPGenerator(4, 5, num_classes=2)
    with pytest.raises(ValueError, match=r"records' shape \(3,\), got \(5,\)"):
        fit(model, tmp_path, max_steps=1)


def test_a_private_strategy_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path)
    with pytest.raises(ValueError, match="plain `Trainer"):
        trainer.fit(make_model(), DataLoader(make_records(), batch_size=5))


def test_spawned_processes_and_few_teachers_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="start_method='spawn'"):
        check_trainer(trainer, make_model().settings)
    trainer = L.Trainer(accelerator="cpu", devices=7, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="num_teachers=6 on 7 ranks"):
        check_trainer(trainer, make_model().settings)


def test_plan_and_epsilon_before_a_run() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="got none yet"):
        _ = model.plan
    with pytest.raises(ValueError, match="no steps recorded"):
        model.epsilon()


def test_bf16_mixed_trains(tmp_path: Path) -> None:
    model = make_model()
    before = copy.deepcopy(model.generator.state_dict())
    fit(model, tmp_path, precision="bf16-mixed")
    assert model.ledger.num_steps == 4
    assert not all(torch.equal(before[name], value) for name, value in model.generator.state_dict().items())
    assert all(bool(value.isfinite().all()) for value in model.generator.state_dict().values())
