"""The privacy card: what it says, where it goes, and that a resumed run cannot say less than it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import (
    DPStrategy,
    GradientDiagnostics,
    NoiseScheduler,
    PrivacyAudit,
    PrivacyCard,
    PrivacyError,
    RandomSparsification,
)
from lightning_dp.accounting import attack_bounds
from lightning_dp.reporting.statement import describe_epsilon, describe_share
from tests.helpers import Classifier, make_loader, make_trainer

FILES = ["privacy_card.json", "privacy_card.md", "privacy_card.svg"]


def fit(tmp_path: Path, strategy: DPStrategy | None = None, **options: Any) -> tuple[DPStrategy, L.Trainer]:
    strategy = strategy or DPStrategy(noise_multiplier=1.3, target_delta=1e-5, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, log_every_n_steps=1, **options)
    trainer.fit(Classifier(), make_loader())
    return strategy, trainer


def cards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("privacy_card*"))


def test_card_is_beside_the_loggers_files_and_says_what_happened(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    strategy, _ = fit(
        tmp_path,
        max_epochs=4,
        logger=CSVLogger(tmp_path),
        callbacks=[
            NoiseScheduler("step", factor=0.5, every_n_epochs=2),
            RandomSparsification(0.5),
            GradientDiagnostics(),
        ],
    )
    directory = tmp_path / "lightning_logs" / "version_0"
    assert cards(directory) == FILES
    card = json.loads((directory / "privacy_card.json").read_text(), parse_constant=pytest.fail)
    assert card["epsilon"] == pytest.approx(strategy.epsilon(), rel=1e-12)
    assert (card["delta"], card["setting"]) == (1e-5, "central")
    assert card["definition"]["neighboring_relation"] == "add_or_remove_one"
    assert card["definition"]["dataset_size"] == 64
    assert card["accounting"]["steps"] == 16
    assert card["accounting"]["epsilon_over_steps"][-1] == [16, pytest.approx(card["epsilon"], rel=1e-9)]
    assert card["accounting"]["computed_by"] == f"lightning-dp {card['software']['lightning-dp']}"
    assert card["mechanism"]["sample_rate"] == 0.25
    assert [(run["steps"], run["noise_multiplier"]) for run in card["mechanism"]["noise_over_steps"]] == [
        (8, 1.3),
        (8, 0.65),
    ]
    decided = " ".join(card["mechanism"]["callbacks"])
    assert "RandomSparsification(final_rate=0.5" in decided
    assert "NoiseScheduler(kind='step', factor=0.5, every_n_epochs=2" in decided
    assert "logged without noise: nonprivate/clip_fraction" in card["not_covered"]
    assert any("validation" in item for item in card["not_covered"])
    assert any("hyper-parameters" in item for item in card["not_covered"])
    markdown = (directory / "privacy_card.md").read_text()
    assert f"epsilon = {describe_epsilon(strategy.epsilon())} and delta = 1e-05" in markdown
    assert "| 9 to 16 | 0.65 |" in markdown
    assert "![epsilon over steps, and the success of attacks](privacy_card.svg)" in markdown
    bounds = attack_bounds(strategy.ledger)
    assert card["attacks"]["largest_true_positive_rates"] == [
        [rate, pytest.approx(right, rel=1e-9)]
        for rate, right in zip((1e-3, 1e-2, 0.1), bounds.true_positive_rates, strict=True)
    ]
    assert card["attacks"]["largest_advantage"] == pytest.approx(bounds.advantage, rel=1e-9)
    for wrong, right in card["attacks"]["largest_true_positive_rates"]:
        assert f"| {describe_share(wrong)} | {describe_share(right)} |" in markdown
    assert f"is {describe_share(bounds.advantage)}." in markdown
    picture = (directory / "privacy_card.svg").read_text()
    assert picture.startswith("<?xml")
    assert "</svg>" in picture


@pytest.mark.parametrize("dry", [False, True])
def test_nothing_is_written_without_a_logger_or_in_a_dry_run(tmp_path: Path, dry: bool) -> None:
    options = {"fast_dev_run": 2, "logger": CSVLogger(tmp_path)} if dry else {"logger": False}
    strategy, _ = fit(tmp_path, **options)
    assert strategy.ledger.num_steps == (2 if dry else 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_picture")
def test_callback_says_where_and_whether(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[PrivacyCard(tmp_path / "here" / "it is")])
    assert cards(tmp_path / "here" / "it is") == FILES[:2]
    fit(tmp_path / "root", callbacks=[PrivacyCard()])
    assert cards(tmp_path / "root") == FILES[:2]
    fit(tmp_path / "none", logger=CSVLogger(tmp_path / "none"), callbacks=[PrivacyCard(enabled=False)])
    assert cards(tmp_path / "none") == []
    fit(tmp_path / "other", logger=CSVLogger(tmp_path / "logs"), callbacks=[PrivacyCard(tmp_path / "other")])
    assert cards(tmp_path / "logs") == []
    fit(tmp_path / "dry", fast_dev_run=1, callbacks=[PrivacyCard(tmp_path / "dry")])
    assert cards(tmp_path / "dry") == []


@pytest.mark.usefixtures("no_picture")
def test_callback_leaves_nothing_behind(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, logger=CSVLogger(tmp_path), callbacks=[PrivacyCard(enabled=False)])
    assert cards(tmp_path) == []
    trainer.callbacks.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Classifier(), make_loader())
    assert cards(tmp_path) == FILES[:2]


@pytest.mark.usefixtures("no_picture")
def test_card_holds_audits_of_callbacks_after_it(tmp_path: Path) -> None:
    """The card is written when all callbacks have ended."""
    audit = PrivacyAudit(10)
    fit(tmp_path, callbacks=[PrivacyCard(tmp_path / "card"), audit])
    assert audit.result is not None
    assert audit.result.describe() in (tmp_path / "card" / "privacy_card.json").read_text()


def test_callback_needs_a_private_strategy_and_a_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="with PrivacyCard, got SingleDeviceStrategy"):
        make_trainer("auto", tmp_path, callbacks=[PrivacyCard()]).fit(Classifier(), make_loader())
    with pytest.raises(TypeError, match="Expected dirpath to be a path, got dirpath=3"):
        PrivacyCard(3)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_picture")
def test_files_that_cannot_be_written_do_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="privacy card could not be written"):
        strategy, _ = fit(tmp_path, callbacks=[PrivacyCard(tmp_path / "file")])
    assert strategy.ledger.num_steps == 4


@pytest.mark.usefixtures("no_picture")
def test_without_matplotlib_the_numbers_are_a_table(tmp_path: Path) -> None:
    strategy, _ = fit(tmp_path, callbacks=[PrivacyCard(tmp_path)])
    assert cards(tmp_path) == FILES[:2]
    markdown = (tmp_path / "privacy_card.md").read_text()
    assert "No plot: matplotlib is not installed." in markdown
    assert f"| 4 | {describe_epsilon(strategy.epsilon())} |" in markdown


def test_a_run_without_noise_says_that_it_is_not_private(tmp_path: Path) -> None:
    fit(tmp_path, DPStrategy(noise_multiplier=0.0, target_delta=1e-5), callbacks=[PrivacyCard(tmp_path)])
    assert cards(tmp_path) == FILES[:2]
    card = json.loads((tmp_path / "privacy_card.json").read_text(), parse_constant=pytest.fail)
    assert card["epsilon"] == "inf"
    assert "NOT differentially private: some step had no noise" in card["statement"]
    assert card["attacks"]["largest_true_positive_rates"] == [[0.001, 1.0], [0.01, 1.0], [0.1, 1.0]]
    assert "| 4 | infinite |" in (tmp_path / "privacy_card.md").read_text()


@pytest.mark.usefixtures("no_picture")
def test_a_seed_is_said_and_survives_a_resume_without_one(tmp_path: Path) -> None:
    _, trainer = fit(
        tmp_path, DPStrategy(noise_multiplier=1.3, target_delta=1e-5, seed=3), callbacks=[GradientDiagnostics()]
    )
    trainer.save_checkpoint(tmp_path / "seeded.ckpt", weights_only=False)
    resumed = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, secure_rng=True)
    trainer = make_trainer(resumed, tmp_path, max_epochs=2, callbacks=[PrivacyCard(tmp_path)])
    trainer.fit(Classifier(), make_loader(), ckpt_path=tmp_path / "seeded.ckpt")
    card = json.loads((tmp_path / "privacy_card.json").read_text())
    for text in (card["statement"], resumed.privacy_statement()):
        assert "nothing here holds against someone who knows it" in text
    assert card["accounting"]["assumptions_hold"] is False
    assert card["accounting"]["steps"] == 8
    assert "logged without noise: nonprivate/clipping_bias" in card["not_covered"]
    assert not resumed.notes.secure_rng


def test_damaged_notes_are_refused(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "whole.ckpt", weights_only=False)
    state = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    state["lightning_dp"]["notes"]["seeded"] = "no"
    torch.save(state, tmp_path / "damaged.ckpt")
    with pytest.raises(PrivacyError, match="Expected intact notes of the run"):
        make_trainer(DPStrategy(noise_multiplier=1.3), tmp_path, max_epochs=2).fit(
            Classifier(), make_loader(), ckpt_path=tmp_path / "damaged.ckpt"
        )
