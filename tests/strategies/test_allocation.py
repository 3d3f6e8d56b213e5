"""Shuffled runs of a Trainer are in the ledger as random allocation: every pass begun, each of all its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DPStrategy, NoiseScheduler
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_loader, make_trainer


def shuffled(**options: Any) -> DPStrategy:
    defaults: dict[str, Any] = {"noise_multiplier": 2.0, "target_delta": 1e-3, "sampling": "shuffle"}
    return DPStrategy(**{**defaults, "check_per_sample": False, **options})


def fit(tmp_path: Path, strategy: DPStrategy, *, ckpt_path: Path | None = None, **options: Any) -> DPStrategy:
    trainer = make_trainer(strategy, tmp_path, **options)
    trainer.fit(Classifier(), make_loader(), ckpt_path=ckpt_path, weights_only=True)
    return strategy


def paid(strategy: DPStrategy) -> dict[Any, int]:
    return strategy.ledger.mechanisms()


@pytest.mark.parametrize(
    ("options", "num_batches", "passes", "steps"),
    [
        ({"max_epochs": 3}, 4, 3, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 2, 3, 6),
        ({"max_epochs": 3, "limit_train_batches": 2}, 4, 3, 6),
        ({"max_epochs": -1, "max_steps": 9}, 4, 3, 9),
        ({"max_epochs": 3, "overfit_batches": 2}, 2, 3, 6),
    ],
)
def test_each_pass_is_paid_whole(
    tmp_path: Path, options: dict[str, Any], num_batches: int, passes: int, steps: int
) -> None:
    strategy = fit(tmp_path, shuffled(), **options)
    assert paid(strategy) == {(1 / num_batches, 2.0, num_batches): passes}
    assert strategy.ledger.num_steps == steps
    expected = Ledger()
    expected.record(PrivacyEvent.allocation(noise_multiplier=2.0, num_batches=num_batches), passes * num_batches)
    assert strategy.epsilon() == make_accountant("pld").epsilon(expected, 1e-3)
    assert f"random allocation to {num_batches} batches per pass" in strategy.privacy_statement()


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}])
def test_target_is_met_from_below(tmp_path: Path, options: dict[str, Any]) -> None:
    strategy = fit(tmp_path, shuffled(noise_multiplier=None, target_epsilon=2.0), max_epochs=5, **options)
    assert 1.98 <= strategy.epsilon() <= 2.0


class Saving(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize(("saved_at", "passes"), [(4, 3), (6, 4), (8, 3)])
def test_resume_within_a_pass_pays_one_pass_more(tmp_path: Path, saved_at: int, passes: int) -> None:
    """Twelve steps in passes of four; after a resume the records are drawn again."""
    path = tmp_path / "saved.ckpt"
    fit(tmp_path, shuffled(), max_epochs=3, callbacks=[Saving(path, saved_at)])
    resumed = fit(tmp_path, shuffled(), max_epochs=3, ckpt_path=path)
    assert (resumed.ledger.num_steps, paid(resumed)) == (12, {(0.25, 2.0, 4): passes})


def test_target_holds_through_a_resume_within_a_pass(tmp_path: Path) -> None:
    path, target = tmp_path / "saved.ckpt", {"noise_multiplier": None, "target_epsilon": 2.0}
    fit(tmp_path, shuffled(**target), max_epochs=3, callbacks=[Saving(path, 6)])
    resumed = fit(tmp_path, shuffled(**target), max_epochs=3, ckpt_path=path)
    assert sum(paid(resumed).values()) == 4
    assert resumed.epsilon() <= 2.0


def test_old_checkpoint_keeps_what_its_passes_cost(tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(tmp_path, shuffled(), max_epochs=3, callbacks=[Saving(path, 8)])
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["lightning_dp"]
    del state["plan"]["batches_per_pass"]
    for entry in state["ledger"]["entries"]:
        entry["kind"] = "shuffle"
        del entry["num_batches"]
    torch.save(checkpoint, path)
    resumed = fit(tmp_path, shuffled(), max_epochs=3, ckpt_path=path)
    assert paid(resumed) == {(1.0, 2.0, 1): 2, (0.25, 2.0, 4): 1}


def test_pass_with_changing_noise_costs_its_smallest(tmp_path: Path) -> None:
    schedule = NoiseScheduler("step", factor=0.5, every_n_epochs=6, interval="step")
    strategy = fit(tmp_path, shuffled(), max_epochs=3, callbacks=[schedule])
    assert paid(strategy) == {(0.25, 2.0, 4): 1, (0.25, 1.0, 4): 2}


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
def test_other_relations_are_not_amplified_and_say_so(tmp_path: Path, relation: str) -> None:
    strategy = fit(tmp_path, shuffled(neighboring_relation=relation), max_epochs=3)
    assert paid(strategy) == {(1.0, 2.0, 1): 3}
    assert "shuffled batches without amplification" in strategy.privacy_statement()
