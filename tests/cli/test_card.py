"""``lightning-dp card``: the statement of a checkpoint, from the ledger and plan that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import DPStrategy, GradientDiagnostics, NoiseScheduler
from lightning_dp.cli import main
from tests.datalens.helpers import fit, make_model
from tests.helpers import Classifier, make_loader, make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DPStrategy, Path]:
    """A short private run with callbacks, and its checkpoint."""
    directory = tmp_path_factory.mktemp("run")
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, accountant="rdp", seed=1)
    callbacks = [NoiseScheduler("step", factor=0.5, every_n_epochs=1), GradientDiagnostics()]
    trainer = make_trainer(strategy, directory, max_epochs=2, callbacks=callbacks)
    trainer.fit(Classifier(), make_loader())
    trainer.save_checkpoint(directory / "last.ckpt", weights_only=False)
    return strategy, directory / "last.ckpt"


def test_statement_is_that_of_the_run(capsys: pytest.CaptureFixture[str], run: tuple[DPStrategy, Path]) -> None:
    strategy, path = run
    assert main(["card", str(path)]) == 0
    assert capsys.readouterr().out.rstrip() == strategy.privacy_statement()
    assert "a seed was set" in strategy.privacy_statement()
    assert "nonprivate/clip_fraction" in strategy.privacy_statement()


def test_card_for_machines_and_as_markdown(capsys: pytest.CaptureFixture[str], run: tuple[DPStrategy, Path]) -> None:
    strategy, path = run
    assert main(["card", str(path), "--json"]) == 0
    card = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert card["epsilon"] == pytest.approx(strategy.epsilon(), rel=1e-12)
    assert [entry["noise_multiplier"] for entry in card["mechanism"]["noise_over_steps"]] == [1.3, 0.65]
    assert any("NoiseScheduler(kind='step'" in text for text in card["mechanism"]["callbacks"])
    assert card["mechanism"]["clipping"] == repr(strategy.plan.clipping)
    assert main(["card", str(path), "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert markdown.startswith("# Privacy card\n\nThe parameters after 8 steps")
    assert "| 5 to 8 | 0.65 |" in markdown


def _without(*path: str) -> Any:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def _empty_ledger(state: dict[str, Any]) -> None:
    state["lightning_dp"]["ledger"] |= {"entries": [], "num_steps": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("lightning_dp"), "Expected a checkpoint with a privacy ledger"),
        (_without("lightning_dp", "plan"), "Expected ledger and plan in the checkpoint"),
        (_without("lightning_dp", "plan", "delta"), "Expected an intact plan, got delta=None"),
        (_without("lightning_dp", "ledger", "entries"), "Expected an intact ledger"),
        (lambda state: state["lightning_dp"].update(plan=None), "Expected the plan of the run"),
        (lambda state: state["lightning_dp"]["notes"].update(seeded=1), "Expected intact notes"),
        (lambda state: state.update(hyper_parameters=Path("x")), "Expected a checkpoint of plain values"),
        (_empty_ledger, "Expected a checkpoint of a private run that has begun, got no steps recorded"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], run: tuple[DPStrategy, Path], tmp_path: Path, change: Any, message: str
) -> None:
    state = torch.load(run[1], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "changed.ckpt")
    assert main(["card", str(tmp_path / "changed.ckpt")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"lightning-dp card: error: {message}")
    assert captured.err.count("\n") == 1


def test_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    for path, message in ((tmp_path / "gone.ckpt", "which does not exist"), (tmp_path / "text.ckpt", "which is none")):
        assert main(["card", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_statement_of_a_datalens_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_model()
    fit(model, tmp_path).save_checkpoint(tmp_path / "lens.ckpt", weights_only=False)
    assert main(["card", str(tmp_path / "lens.ckpt")]) == 0
    assert capsys.readouterr().out.rstrip() == model.privacy_statement()
    assert main(["card", str(tmp_path / "lens.ckpt"), "--json"]) == 2
    assert "got one of DataLens" in capsys.readouterr().err
