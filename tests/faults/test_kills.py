"""kill -9 anywhere in a run, many times over: epsilon never below the truth, and never half of anything (I4, I7).

Truth is what the surviving weights are made of: a release counts if, and only if, its result is in what is left. The
journal of ``kill_server.py`` counts it without any ledger.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from lightning_dp import DPStrategy
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from lightning_dp.strategies.checkpoint_io import PARTIAL
from tests.helpers import Classifier, make_loader, make_trainer
from tests.processes import run_script

SERVER = Path(__file__).with_name("kill_server.py")


def deaths(folder: Path, number: int, seed: int) -> list[dict[str, Any]]:
    run_script(SERVER, folder, number, seed, folder=folder, OMP_NUM_THREADS="1")
    return [json.loads(line) for line in (folder / "deaths.jsonl").read_text().splitlines()]


def spent(steps: int) -> float:
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="poisson", noise_multiplier=1.3, sample_rate=0.25), steps)
    return make_accountant("pld").epsilon(ledger, 1e-5)


def check(folder: Path, found: list[dict[str, Any]]) -> None:
    previous = 0
    lineages = set()
    for death in found:
        assert death["signal"] == signal.SIGKILL, death
        assert set(death["files"]) <= {"last.ckpt", f"last.ckpt{PARTIAL}"}, death
        if death["ledger"] is None:
            assert previous == 0, death  # a checkpoint that was there is never lost
            continue
        assert death["ledger"] >= death["truth"], death
        assert death["ledger"] == death["global_step"] == death["truth"], death  # nor more: all of these survived
        assert death["truth"] >= previous, death
        assert [entry["num_steps"] for entry in death["entries"]] == [death["truth"]], death
        assert death["optimizer_tensors"] == [], death  # and the state dict is the weights: no sum is kept anywhere
        assert death["keys"] == sorted(dict(Classifier().named_parameters())), death
        previous = death["truth"]
        lineages.add(death["lineage"])
    assert previous > 0
    assert len(lineages) == 1
    resumed_run(folder, previous)


def resumed_run(folder: Path, truth: int) -> None:
    """After the last death, epsilon covers all releases."""
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5, check_per_sample=False)
    trainer = make_trainer(strategy, folder, max_steps=truth + 3, max_epochs=-1)
    trainer.fit(Classifier(), make_loader(), ckpt_path=folder / "last.ckpt", weights_only=True)
    assert strategy.ledger.num_steps == strategy.steps_taken == truth + 3
    assert strategy.epsilon() == pytest.approx(spent(truth + 3), rel=1e-9)


def test_no_death_loses_a_release(tmp_path: Path) -> None:
    check(tmp_path, deaths(tmp_path, 11, seed=1))


@pytest.mark.slow
def test_no_death_of_fifty_loses_a_release(tmp_path: Path) -> None:
    check(tmp_path, deaths(tmp_path, 50, seed=2))
