"""Queues, searches, splits and pages of the benchmarks on real data, with made-up outcomes: nothing is trained or
fetched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import claims, images, noise_studies, published, recipes, runs, units_and_noise
from benchmarks.averages import Averages
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


def test_again_trains_the_recipe_of_an_epsilon(
    executed: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recipes, "execute", runs.execute)
    monkeypatch.setitem(recipes.TASKS, "made up", recipes.Task("Title", RUN, {}))
    results = Results(tmp_path / "lines")
    found = list(recipes.recipes(recipes.TASKS["made up"], results, math.inf))
    text = recipes.again("made up", "8", results)
    assert executed[-1] == found[2].but(report=True, seed=recipes.SEEDS[0])
    assert text.startswith("Title: ")
    assert text.endswith("% at epsilon 2.99")
    with pytest.raises(ValueError, match="Expected an epsilon of the page, got epsilon=2"):
        recipes.again("made up", "2", results)


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
        for rate in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0):
            peak = 256.0 if arm == "high" else 2.0
            results.add(run.but(lr=rate, seed=claims.SEARCH_SEED), outcome(0.8 - abs(rate - peak) / 100))
        for seed in claims.SEEDS:
            results.add(run.but(lr=peak, seed=seed, report=True), outcome(0.7 + seed / 1000 + (arm == "high") / 10))
    text = claims.section("made up", results)
    assert "| low | 2 |" in text
    assert "| high | 256, an end of the grid |" in text
    assert "| high minus low | +10.00 ± 0.00 | open: a rate at an end of the grid |" in text
    assert "On the test split: 6 runs, 0.1 minutes of one core and 0.2 of wall clock" in text


@pytest.mark.parametrize(("second", "sign", "says"), [(0.8, 1, "holds"), (0.8, -1, "does not hold"), (0.9, 1, "open")])
def test_verdict_follows_sign_and_error(second: float, sign: int, says: str) -> None:
    noise = {"0": 0.001, "1": -0.001, "2": 0.0005}
    first = dict.fromkeys(noise, 0.9)
    assert claims.verdict(first, {seed: second + value for seed, value in noise.items()}, sign)[1] == says
    assert claims.verdict(first, {"7": 0.1}, 1)[1] == "not run"


def test_claimed_epsilon_adds_up_epochs_not_steps() -> None:
    assert claims.claimed_epsilon([1.1] * 60, 0.01) == pytest.approx(1.25, abs=0.01)


def test_sigmas_follow_the_schedule_of_an_arm() -> None:
    line = {"steps": 354, "sigma": 2.0}
    run = Run("made up", "tanh mlp", 6, 1024, 1.0, epsilon=3.0, method="noise step .85")
    assert claims.sigmas_of(run, line) == pytest.approx([2.0, 2.0, 2.0, 1.7, 1.7, 1.7])
    assert claims.sigmas_of(run.but(method="quantile .5"), line) == [2.0] * 6


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


def test_averages_follow_their_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    module = runs.Model(Run("made up", "text linear", 1, 1, 0.1))
    weights, averages = next(module.parameters()), Averages((0.5,))
    trainer = L.Trainer(logger=False, enable_progress_bar=False)
    averages.on_train_start(trainer, module)
    expected = 0.0
    for step in (1, 2, 30):
        monkeypatch.setattr(L.Trainer, "global_step", step)
        weights.data.fill_(step)
        averages.on_train_batch_end(trainer, module)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averages.weights[0.5][: weights.numel()].tolist() == pytest.approx([expected] * weights.numel())


def test_averages_leave_the_last_weights() -> None:
    module = runs.Model(Run("made up", "text linear", 1, 1, 0.1))
    averages = Averages((0.9,))
    averages.weights = {0.9: torch.cat([-torch.ones(384), torch.ones(384), torch.zeros(2)])}
    records = TensorDataset(torch.ones(4, 384), torch.tensor([1, 1, 1, 0]))
    assert averages.accuracies(module, module.net, records) == {"0.9": 0.75}
    assert all(not parameter.any() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "kind"), [("equal", "equal"), ("least", "least")])
def test_clipping_of_a_run_shares_noise(name: str, kind: str) -> None:
    clipping = runs.clipping_of(RUN.but(clipping=name, clip=0.5))
    assert (clipping.max_grad_norm, clipping.noise) == (0.5, kind)  # type: ignore[union-attr]
    assert runs.clipping_of(RUN.but(clipping="top .25")).k == 0.25  # type: ignore[union-attr]


def made_up_line(run: Run) -> dict[str, Any]:
    """Best at rate times bound 4 and bound .9 for the last weights, at 8 for the average of decay .98."""

    def height(peak: float) -> float:
        return 0.9 - 0.01 * abs(math.log2(run.lr * run.clip / peak)) - 0.01 * abs(math.log(run.clip / 0.9, 3))

    bonus = 0.001 * run.seed + 0.01 * (run.clipping == "least") + 0.0001 * (run.clipping == "equal") * (-1) ** run.seed
    return {
        **outcome(height(4) + bonus),
        "averages": {"0.95": height(8) + bonus - 0.002, "0.98": height(8) + bonus},
    }


def test_recipe_climbs_and_keeps_rate_times_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "execute", made_up_line)
    results, study = Results(tmp_path / "lines"), noise_studies.STUDIES["letter"]
    last = noise_studies.recipe(study, noise_studies.FLAT, 3.0, "last", results, math.inf)
    assert (last.run.lr * last.run.clip, last.run.clip, last.decay, last.ends) == (
        pytest.approx(4.8, rel=0.01),
        pytest.approx(0.9),
        "",
        (),
    )
    average = noise_studies.recipe(study, noise_studies.FLAT, 3.0, noise_studies.AVERAGE, results, math.inf)
    assert (average.run, average.decay) == (last.run, "0.98")
    own = noise_studies.recipe(study, noise_studies.FLAT, 1.0, noise_studies.OWN, results, math.inf)
    assert (own.run.lr * own.run.clip, own.decay) == (pytest.approx(9.6, rel=0.01), "0.98")
    assert own.run.epsilon == 1.0
    assert {run.seed for run in results.lines} == {noise_studies.SEARCH_SEED}
    assert not any(run.report for run in results.lines)


def test_climb_says_where_a_grid_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "execute", lambda run: outcome(0.001 * run.lr))
    found, end = noise_studies.climb(
        RUN, noise_studies.faster, (0.5, 1.0, 2.0), "last", Results(tmp_path / "lines"), math.inf
    )
    assert (found.lr, end) == (32.0, True)


def test_judge_repeats_lost_cases_with_more_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def execute(run: Run) -> dict[str, Any]:
        line = made_up_line(run)
        loss = 0.02 * (run.clipping == "least")
        averages = {decay: value - loss for decay, value in line["averages"].items()}
        return {**line, "accuracy": line["accuracy"] - loss, "averages": averages}

    monkeypatch.setattr(runs, "execute", execute)
    study, results = units_and_noise.STUDIES["letter"], Results(tmp_path / "lines")
    monkeypatch.setattr(units_and_noise, "STUDIES", {"letter": study})
    assert units_and_noise.judge(study, 3.0, results, math.inf)
    reported = {(run.clipping, run.seed) for run in results.lines if run.report}
    assert {seed for kind, seed in reported if kind == "flat"} == set(noise_studies.SEEDS)
    for kind in ("least", "equal"):
        assert {seed for name, seed in reported if name == kind} == set(range(15))
    page = units_and_noise.page(results)
    assert "2 cases: 0 better, 2 worse beyond two standard errors: letter at epsilon 3, last weights (-1.00 ±" in page
    assert "| Poisson, per layer, least noise: last | not run |" in page
