"""EpsilonMonitor and PrivacyBudget, as a user meets them: in the logger, in file names, stopping a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DPStrategy, EpsilonMonitor, PrivacyBudget, PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_loader, make_trainer


def spent(steps: int, sigma: float = 1.3, delta: float = 1e-5) -> float:
    """Epsilon of so many steps at q = 1/4, straight from a ledger of its own."""
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="poisson", noise_multiplier=sigma, sample_rate=0.25), steps)
    return make_accountant("pld").epsilon(ledger, delta)


def private(**options: Any) -> DPStrategy:
    return DPStrategy(**{"noise_multiplier": 1.3, "target_delta": 1e-5, "check_per_sample": False, **options})


def read_log(tmp_path: Path, key: str) -> list[tuple[int, float]]:
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()))
    return [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]


def test_epsilon_is_logged_every_n_steps_and_at_each_epochs_end(tmp_path: Path) -> None:
    trainer = make_trainer(
        private(),
        tmp_path,
        max_epochs=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        callbacks=[EpsilonMonitor(every_n_steps=3)],
    )
    trainer.fit(Classifier(), make_loader())
    assert read_log(tmp_path, "epsilon") == [(step - 1, pytest.approx(spent(step), rel=1e-5)) for step in (1, 4, 7, 8)]
    assert read_log(tmp_path, "privacy/delta")[-1] == (7, pytest.approx(1e-5))
    assert read_log(tmp_path, "privacy/noise_multiplier")[-1] == (7, pytest.approx(1.3))
    assert float(trainer.callback_metrics["epsilon"]) == pytest.approx(spent(8), rel=1e-5)
    assert "epsilon" in trainer.progress_bar_metrics


def test_epsilon_names_checkpoints(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{epsilon:.2f}", save_top_k=-1)
    trainer = make_trainer(
        private(), tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[EpsilonMonitor(), checkpoints]
    )
    trainer.fit(Classifier(), make_loader(), make_loader(batch_size=32))
    names = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert names == [f"epoch={epoch}-epsilon={spent(4 * epoch + 4):.2f}.ckpt" for epoch in (0, 1)]


@pytest.mark.parametrize(
    ("options", "saving", "steps"),
    [
        ({"max_epochs": -1, "max_steps": 7}, {}, [7]),
        ({"max_epochs": 5, "callbacks": [PrivacyBudget((spent(6) + spent(7)) / 2)]}, {}, [4, 6]),
        ({"max_epochs": 2, "val_check_interval": 3}, {}, [3, 7]),
        ({"max_epochs": 2}, {"every_n_train_steps": 3}, [3, 6]),
        ({"max_epochs": -1, "max_steps": 7, "limit_val_batches": 0}, {"save_on_train_epoch_end": True}, [4, 7]),
    ],
    ids=["max_steps", "budget", "within an epoch", "every_n_train_steps", "no validation"],
)
@pytest.mark.one_in(2)
def test_epsilon_in_a_file_name_is_that_of_its_weights(
    tmp_path: Path, options: dict[str, Any], saving: dict[str, Any], steps: list[int]
) -> None:
    """Also where steps between two logged values are before the end: a name must not promise less than was spent."""
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{step}-{epsilon:.3f}", save_top_k=-1, **saving)
    callbacks = [EpsilonMonitor(every_n_steps=50), *options.pop("callbacks", []), saved]
    trainer = make_trainer(private(), tmp_path, enable_checkpointing=True, callbacks=callbacks, **options)
    trainer.fit(Classifier(), make_loader(), make_loader(batch_size=32))
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    assert names >= {f"step={step}-epsilon={spent(step):.3f}.ckpt" for step in steps}
    assert all(name == f"step={(step := int(name.split('-')[0][5:]))}-epsilon={spent(step):.3f}.ckpt" for name in names)
    assert float(trainer.callback_metrics["epsilon"]) == pytest.approx(spent(trainer.global_step), rel=1e-5)


def test_epsilon_can_stop_a_run_early(tmp_path: Path) -> None:
    stopping = EarlyStopping(
        monitor="epsilon", mode="min", divergence_threshold=spent(10), patience=100, check_on_train_epoch_end=True
    )
    strategy = private()
    make_trainer(strategy, tmp_path, max_epochs=9, callbacks=[EpsilonMonitor(), stopping]).fit(
        Classifier(), make_loader()
    )
    assert strategy.ledger.num_steps == 12


def test_monitor_needs_a_private_strategy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="with EpsilonMonitor, got SingleDeviceStrategy"):
        make_trainer("auto", tmp_path, callbacks=[EpsilonMonitor()]).fit(Classifier(), make_loader())


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"delta": 0.0}, {"delta": float("nan")}])
def test_monitor_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EpsilonMonitor(**arguments)


@pytest.mark.parametrize("allowed", [3, 4, 7])
def test_budget_stops_before_the_step_that_would_exceed_it(tmp_path: Path, allowed: int) -> None:
    budget = (spent(allowed) + spent(allowed + 1)) / 2
    strategy = private()
    trainer = make_trainer(strategy, tmp_path, max_epochs=5, callbacks=[PrivacyBudget(budget)])
    trainer.fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == trainer.global_step == allowed
    assert strategy.epsilon() <= budget < spent(allowed + 1)


def test_budget_holds_where_the_trainer_may_not_stop(tmp_path: Path) -> None:
    strategy = private()
    trainer = make_trainer(strategy, tmp_path, max_epochs=5, min_epochs=3, callbacks=[PrivacyBudget(spent(6))])
    with pytest.raises(PrivacyError, match="stop after 6 steps"):
        trainer.fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 6


def test_budget_refuses_a_run_already_over_it(tmp_path: Path) -> None:
    strategy = private()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    trainer.fit(Classifier(), make_loader())
    trainer.callbacks.append(PrivacyBudget(spent(5)))
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(PrivacyError, match="already spent"):
        trainer.fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 8
    with pytest.raises(PrivacyError, match="no steps recorded"):
        make_trainer(private(), tmp_path, callbacks=[PrivacyBudget(1e-3)]).fit(Classifier(), make_loader())


def test_budget_that_fits_the_run_changes_nothing(tmp_path: Path) -> None:
    strategy = private()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[PrivacyBudget(spent(8))])
    trainer.fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 8
    assert not trainer.should_stop


def test_budget_on_a_run_without_bounds(tmp_path: Path) -> None:
    strategy = private()
    make_trainer(strategy, tmp_path, max_epochs=-1, callbacks=[PrivacyBudget(spent(9))]).fit(
        Classifier(), make_loader()
    )
    assert strategy.ledger.num_steps == 9


def test_second_budget_is_refused(tmp_path: Path) -> None:
    """The last one would decide, whatever the first one promised."""
    trainer = make_trainer(private(), tmp_path, callbacks=[PrivacyBudget(0.5), PrivacyBudget(50.0)])
    with pytest.raises(ValueError, match="one callback for the limit on epsilon, got PrivacyBudget and PrivacyBudget"):
        trainer.fit(Classifier(), make_loader())


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_arguments(epsilon: float) -> None:
    with pytest.raises(ValueError, match="0 < epsilon < inf"):
        PrivacyBudget(epsilon)
