"""Runs one after another: what an earlier private run has spent on a module's weights is counted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_dp import DPStrategy, PrivacyBudget, PrivacyError
from lightning_dp.accounting import Ledger
from lightning_dp.step.history import joined
from tests.helpers import Classifier, make_loader, make_trainer

COUNTED = pytest.mark.filterwarnings("ignore:.*trained by an earlier private run:UserWarning")


def run(module: Any, tmp_path: Path, callbacks: Any = (), epochs: int = 1, **options: Any) -> DPStrategy:
    defaults: dict[str, Any] = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    strategy = DPStrategy(**{**defaults, "check_per_sample": False, **options})
    make_trainer(strategy, tmp_path, max_epochs=epochs, callbacks=list(callbacks)).fit(module, make_loader())
    return strategy


@COUNTED
def test_a_second_strategy_counts_what_the_first_has_spent(tmp_path: Path) -> None:
    module = Classifier()
    first = run(module, tmp_path)
    with pytest.warns(UserWarning, match="trained by an earlier private run: its 4 steps count"):
        both = run(module, tmp_path)
    assert (both.ledger.num_steps, first.ledger.num_steps) == (8, 4)
    assert both.epsilon() > first.epsilon()
    again = run(module, tmp_path, history=both)
    assert (again.ledger.num_steps, run(module, tmp_path).ledger.num_steps) == (12, 16)
    assert run(Classifier(), tmp_path).ledger.num_steps == 4


def test_each_resume_of_one_checkpoint_counts_its_own_steps(tmp_path: Path) -> None:
    """The weights that a module had before are gone; those of another branch that are loaded in place count."""
    module, path, first = Classifier(), tmp_path / "one.ckpt", Classifier()
    run(first, tmp_path).trainer.save_checkpoint(path)
    branches = []
    for _ in range(2):
        strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, check_per_sample=False)
        trainer = make_trainer(strategy, tmp_path, max_epochs=2)
        trainer.fit(module, make_loader(), ckpt_path=path, weights_only=True)
        branches.append(copy.deepcopy(module.state_dict()))
        assert strategy.ledger.num_steps == 8
    module.load_state_dict(branches[0])
    with pytest.warns(UserWarning, match="its 8 steps count towards epsilon here, too"):
        make_trainer(strategy, tmp_path).fit(module, make_loader())
    assert strategy.ledger.num_steps == 20  # the steps of the checkpoint, which both branches hold, count twice


@COUNTED
def test_weights_that_a_trainer_tests_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.ckpt"
    run(Classifier(), tmp_path).trainer.save_checkpoint(path)
    for known in ("_values", "_carried"):  # as in another process
        monkeypatch.setattr(f"lightning_dp.step.history.{known}", {})
    strategy, module = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, check_per_sample=False), Classifier()
    trainer = make_trainer(strategy, tmp_path)
    trainer.test(module, make_loader(), ckpt_path=path, weights_only=True, verbose=False)
    trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == 8


def test_an_empty_history_states_that_runs_share_no_record(tmp_path: Path) -> None:
    module = Classifier()
    run(module, tmp_path)
    assert run(module, tmp_path, history=[]).ledger.num_steps == 4


def test_federated_rounds_add_up(tmp_path: Path) -> None:
    module, spent = Classifier(), [0.0]
    strategy: Any = []
    for _ in range(3):
        strategy = run(module, tmp_path, history=strategy)
        spent.append(strategy.epsilon())
    assert strategy.ledger.num_steps == 12
    assert spent == sorted(set(spent))


def test_a_history_counts_towards_target_and_budget(tmp_path: Path) -> None:
    module = Classifier()
    first = run(module, tmp_path, noise_multiplier=3.0)
    spent = first.epsilon()
    second = run(module, tmp_path, noise_multiplier=None, target_epsilon=2 * spent, history=first)
    assert spent < second.epsilon() <= 2 * spent
    third = run(
        Classifier(), tmp_path, [PrivacyBudget(epsilon=1.3 * spent)], 20, noise_multiplier=3.0, history=first.ledger
    )
    assert third.epsilon() <= 1.3 * spent
    assert 4 < third.ledger.num_steps < 84


def test_a_history_may_be_a_checkpoint(tmp_path: Path) -> None:
    module = Classifier()
    first = run(module, tmp_path)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert run(module, tmp_path, history=tmp_path / "first.ckpt").ledger.num_steps == 8
    again = run(Classifier(), tmp_path, history=[first.ledger, str(tmp_path / "first.ckpt")])
    assert again.ledger.num_steps == 8  # one run, named twice
    with pytest.raises(TypeError, match="Expected history to hold ledgers or paths"):
        DPStrategy(noise_multiplier=1.0, history=3)  # type: ignore[arg-type]


def test_a_resume_needs_the_history_of_its_run(tmp_path: Path) -> None:
    first = run(Classifier(), tmp_path)
    second = run(Classifier(), tmp_path, history=first.ledger)
    second.trainer.save_checkpoint(tmp_path / "second.ckpt")
    for history, steps in ((first.ledger, 12), (None, 12)):
        strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, history=history)
        trainer = make_trainer(strategy, tmp_path, max_epochs=2)
        trainer.fit(Classifier(), make_loader(), ckpt_path=tmp_path / "second.ckpt", weights_only=True)
        assert strategy.ledger.num_steps == steps
    other = run(Classifier(), tmp_path, noise_multiplier=2.0)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, history=other.ledger)
    with pytest.raises(PrivacyError, match="began with the same history"):
        make_trainer(strategy, tmp_path, max_epochs=2).fit(
            Classifier(), make_loader(), ckpt_path=tmp_path / "second.ckpt", weights_only=True
        )


def test_one_strategy_serves_a_second_trainer(tmp_path: Path) -> None:
    module, strategy = Classifier(), DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    for _ in range(2):
        trainer = make_trainer(strategy, tmp_path)
        trainer.fit(module, make_loader())
        trainer.validate(module, make_loader(), verbose=False)
    assert strategy.ledger.num_steps == 8


@COUNTED
def test_a_target_counts_runs_that_were_not_named(tmp_path: Path) -> None:
    module = Classifier()
    spent = run(module, tmp_path, noise_multiplier=3.0).epsilon()
    second = run(module, tmp_path, noise_multiplier=None, target_epsilon=2 * spent)
    assert spent < second.epsilon() <= 2 * spent
    with pytest.raises(ValueError, match="Expected target_epsilon above what is already spent"):
        run(module, tmp_path, noise_multiplier=None, target_epsilon=spent)
    with pytest.raises(PrivacyError, match="Expected a history under neighboring_relation"):
        run(module, tmp_path, neighboring_relation="replace_one")


@COUNTED
def test_a_module_from_a_private_checkpoint_counts_its_run(tmp_path: Path) -> None:
    first = run(Classifier(), tmp_path)
    path = tmp_path / "first.ckpt"
    first.trainer.save_checkpoint(path)
    module = Classifier.load_from_checkpoint(path)
    assert run(module, tmp_path).ledger.num_steps == 8


@COUNTED
@pytest.mark.parametrize("how", ["deepcopy", "state_dict", "checkpoint"])
def test_a_copy_of_a_private_module_counts_its_run(how: str, tmp_path: Path) -> None:
    first = Classifier(lr=0.1)
    strategy = run(first, tmp_path)
    path = tmp_path / "first.ckpt"
    first.trainer.save_checkpoint(path)
    if how == "deepcopy":
        other = copy.deepcopy(first)
    else:
        other = Classifier()
        saved = first.state_dict() if how == "state_dict" else torch.load(path, weights_only=True)["state_dict"]
        other.load_state_dict(saved)
    assert run(other, tmp_path).ledger.num_steps == 2 * strategy.ledger.num_steps


def test_a_module_that_did_not_move_is_no_copy(tmp_path: Path) -> None:
    """Two modules of one seed begin alike; a run that moves nothing says nothing about the other one."""
    torch.manual_seed(0)
    run(Classifier(lr=0.0), tmp_path)
    torch.manual_seed(0)
    assert run(Classifier(lr=0.0), tmp_path).ledger.num_steps > 0


def test_the_card_command_adds_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_dp.cli.main import main

    paths = [str(tmp_path / name) for name in ("a.ckpt", "b.ckpt")]
    runs = [run(Classifier(), tmp_path) for _ in paths]
    for each, path in zip(runs, paths, strict=True):
        each.trainer.save_checkpoint(path)
    spent = runs[0].accountant.epsilon(joined([each.ledger for each in runs], Ledger()), 1e-3)
    for given, steps in ((paths, 8), (paths[:1] * 2, 4)):
        assert main(["card", *given]) == 0
        said = capsys.readouterr().out
        assert f"{steps} steps" in said
        assert (f"epsilon={spent:.4f}" in said) == (steps == 8)


def test_choices_by_figures_are_in_the_statement(tmp_path: Path) -> None:
    class Plateau(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

    said = run(Plateau(), tmp_path, [EarlyStopping("loss")]).privacy_statement()
    assert "the learning rate, by ReduceLROnPlateau on 'loss'" in said
    assert "EarlyStopping on 'loss'" in said
    assert "chosen by un-noised" not in run(Classifier(), tmp_path).privacy_statement()
