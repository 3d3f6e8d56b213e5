"""Queues, searches, splits and pages of the benchmarks on real data, with made-up outcomes: nothing is trained or
fetched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import claims, images, published, recipes, runs
from benchmarks.runs import Results, Run
from benchmarks.waves import FEATURES, morlet, waves

RUN = Run("made up", "tanh mlp", 10, 100, 1.0, epsilon=3.0)


def outcome(accuracy: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "epsilon": {"pld": 2.99, "rdp": 3.2},
        "sigma": 1.5,
        "steps": 7,
        "seconds": 2.0,
        "processor_seconds": 1.0,
    }


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Return the runs that were executed; the accuracy is best at rate 4, bound .1 and 40 epochs."""
    done: list[Run] = []

    def execute(run: Run) -> dict[str, Any]:
        done.append(run)
        return outcome(
            0.9
            - 0.01 * abs(math.log2(run.lr * run.clip / 4))
            - 0.01 * abs(math.log2(run.epochs / 40))
            + 0.001 * (run.clip < 1)
        )

    monkeypatch.setattr(runs, "execute", execute)
    return done


def test_results_resume_where_the_file_ends(executed: list[Run], tmp_path: Path) -> None:
    wanted = [RUN.but(seed=seed) for seed in range(3)]
    assert Results(tmp_path / "lines").fill(wanted[:2])
    assert Results(tmp_path / "lines").fill(wanted)
    assert executed == wanted
    line = Results(tmp_path / "lines").lines[wanted[2]]
    assert {"accuracy", "epsilon", "seconds", "machine", "commit", "day"} <= line.keys()


def test_results_start_nothing_after_the_budget(executed: list[Run], tmp_path: Path) -> None:
    assert not Results(tmp_path / "lines").fill([RUN], until=time.time() - 1)
    assert executed == []


def test_results_mean_is_over_the_asked_seeds(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines")
    for seed, value in enumerate((0.5, 0.7, 0.1)):
        results.add(RUN.but(seed=seed), outcome(value))
    mean = results.mean(RUN, (0, 1, 9))
    assert mean is not None
    assert (mean.value, mean.count) == (pytest.approx(0.6), 2)
    assert results.mean(RUN.but(lr=2.0), (0, 1)) is None


def test_search_grows_grids_and_keeps_the_step(executed: list[Run], tmp_path: Path) -> None:
    grids = {"lr": (1.0, 2.0), "epochs": (10, 20), "clip": (0.1, 1.0)}
    found = recipes.search(RUN, grids, Results(tmp_path / "lines"), math.inf)
    assert (found.lr, found.epochs, found.clip) == (40.0, 40, 0.1)
    assert {run.seed for run in executed} == set(recipes.SEARCH_SEEDS)
    assert not any(run.report for run in executed)


def test_search_seeds_are_not_reported() -> None:
    assert not set(recipes.SEARCH_SEEDS) & set(recipes.SEEDS)
    assert claims.SEARCH_SEED not in claims.SEEDS


def test_changed_momentum_keeps_the_step() -> None:
    assert recipes.changed(RUN, "momentum", 0.9).lr == pytest.approx(0.1)
    assert recipes.changed(RUN, "batch", 200).lr == 1.0


def test_chosen_arms_report_on_the_test_split(executed: list[Run], tmp_path: Path) -> None:
    study = claims.Study("claim", "setting", {"a": RUN}, (1.0, 2.0), ())
    best = claims.chosen(study, Results(tmp_path / "lines"), math.inf)
    assert best == {"a": RUN.but(lr=4.0, report=True)}
    assert all(run.seed == claims.SEARCH_SEED and not run.report for run in executed)


def test_section_leaves_a_rate_at_an_end_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arms = {"low": RUN, "high": RUN.but(method="sparse .9")}
    study = claims.Study("claim", "setting", arms, (1.0, 2.0, 4.0), (("high", "low", 1),))
    monkeypatch.setitem(claims.STUDIES, "made up", study)
    results = Results(tmp_path / "lines")
    for arm, run in arms.items():
        for rate in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
            peak = 16.0 if arm == "high" else 2.0
            results.add(run.but(lr=rate, seed=claims.SEARCH_SEED), outcome(0.8 - abs(rate - peak) / 100))
        for seed in claims.SEEDS:
            results.add(run.but(lr=peak, seed=seed, report=True), outcome(0.7 + seed / 1000 + (arm == "high") / 10))
    text = claims.section("made up", results)
    assert "| low | 2 |" in text
    assert "| high | 16, an end of the grid |" in text
    assert "| high minus low | +10.00 ± 0.00 | open: a rate at an end of the grid |" in text


@pytest.mark.parametrize(("second", "sign", "says"), [(0.8, 1, "holds"), (0.8, -1, "does not hold"), (0.9, 1, "open")])
def test_verdict_follows_sign_and_error(second: float, sign: int, says: str) -> None:
    noise = {"0": 0.001, "1": -0.001, "2": 0.0005}
    first = dict.fromkeys(noise, 0.9)
    assert claims.verdict(first, {seed: second + value for seed, value in noise.items()}, sign)[1] == says
    assert claims.verdict(first, {"7": 0.1}, 1)[1] == "not run"


def test_published_page_says_what_was_not_run(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines")
    results.add(published.MNIST, outcome(0.95))
    results.add(published.MNIST.but(seed=1), outcome(0.94))
    page = published.page(results)
    assert "| 94.50 ± 0.50 (2) | 1.19 | 0.83 | 0.92 |" in page
    assert "Not run: MNIST, sigma 1.1, 60 epochs;" in page


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Tensor]:
    monkeypatch.setitem(images.VALIDATION, "made up", 3)
    monkeypatch.setattr(
        images, "_inputs", lambda name: (torch.arange(10), torch.arange(10), -torch.arange(4), torch.arange(4))
    )
    return lambda: torch.arange(10)


@pytest.mark.usefixtures("parts")
def test_split_of_keeps_test_records_out_of_choices() -> None:
    choice, report = images.split_of("made up", report=False), images.split_of("made up", report=True)
    assert choice.train.tensors[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert choice.held_out.tensors[0].tolist() == [7, 8, 9]
    assert report.train.tensors[0].tolist() == list(range(10))
    assert report.held_out.tensors[0].tolist() == [0, -1, -2, -3]


def test_waves_depend_on_one_image_alone() -> None:
    pictures = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    together, alone = waves(pictures), waves(pictures[3:4])
    assert together.shape == (5, FEATURES)
    assert (together[3] - alone[0]).abs().max() < 1e-5


def test_morlet_answers_at_its_own_angle() -> None:
    ramp = torch.arange(11.0).expand(11, 11)
    wave = torch.cos(3 * math.pi / 4 / 1.6 * (ramp - 5))
    along, across = (morlet(11, 1.6, angle)[0] for angle in (0.0, math.pi / 2))
    assert abs(float(along.sum())) < 1e-6
    assert abs(float((wave * along).sum())) > 10 * abs(float((wave * across).sum()))
