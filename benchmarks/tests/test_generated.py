"""The searches, the page, the teachers and the generators of the benchmark of images; nothing is fetched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import gan_run, generated, generated_report, lens_run, prototypes
from benchmarks.tasks import Split
from lightning_dp.datalens.shards import Shards
from lightning_dp.datalens.teachers import Teachers

COST = {"cnn": 0.5, "spent": 1.0, "seconds": 1, "processor_seconds": 1}


def test_generated_search_keeps_the_best_way_to_draw(tmp_path: Path) -> None:
    def execute(run: generated.Lens) -> dict[str, Any]:
        return {"linear": 0.5 + 0.01 * run.weighted * (1 if run.epsilon == 10 else -1), "noise_std": 9.0, **COST}

    def lines_of(name: str) -> generated.Lines[generated.Lens]:
        return generated.Lines(tmp_path / name, generated.Lens, execute)

    lines = lines_of("lines")
    found = generated.chosen(lines, math.inf)
    assert found is not None
    assert {epsilon: run.weighted for epsilon, run in found.items()} == {10.0: True, 1.0: False}
    clothes = generated.both(found)["fashion_mnist"]
    assert {(run.data, run.moves, run.weighted) for run in clothes.values()} == {
        ("fashion_mnist", 0.5, True),
        ("fashion_mnist", 0.5, False),
    }
    assert all(run.seed == lens_run.SEARCH_SEED and not run.report for run in lines.lines)
    assert lines_of("lines").lines.keys() == lines.lines.keys()
    assert generated.chosen(lines_of("none"), 0.0) is None


def test_generated_search_of_the_gan_keeps_each_better_number(tmp_path: Path) -> None:
    def execute(run: gan_run.Gan) -> dict[str, Any]:
        score = -abs(run.lr - 4e-3 / run.epsilon) - abs(run.epochs - 24) - abs(run.batch - 600)
        return {"linear": score, "sigma": 1.0, "steps": 9, **COST}

    lines = generated.Lines(tmp_path / "lines", generated.Gan, execute)
    found = generated.searched(lines, math.inf)
    assert found is not None
    start = gan_run.START
    assert found[1.0] == replace(start, lr=4e-3, epochs=24)
    assert found[10.0] == replace(start, epsilon=10.0, lr=1e-3, epochs=24)
    assert all(run.data == "mnist" and run.seed == lens_run.SEARCH_SEED and not run.report for run in lines.lines)
    assert len(lines.lines) == 2 * 10  # grids of 3, 3, 3, 2, 2 and 2 values
    assert {run.data for run in generated.both(found)["fashion_mnist"].values()} == {"fashion_mnist"}


def test_generated_page_compares_the_seeds_of_the_report() -> None:
    lens = generated.Lens("mnist", 1.0, 1, 4000, 100, 2.5, 1.0, 0.3)
    gan = replace(gan_run.START, batch=601)

    def method(run: Any, scores: list[float]) -> generated_report.Method:
        whole = {"noise_std": 9.0, "sigma": 1.0, "steps": 9, "machine": "here", "commit": "abc", **COST}
        tried = {replace(run, seed=100): {**whole, "linear": 0.99}}
        seeds = {replace(run, seed=n, report=True): {**whole, "linear": s} for n, s in enumerate(scores)}
        return {**tried, **seeds}, {"mnist": {1.0: run}}

    moved = generated.moved({"mnist": {1.0: gan}}, {"mnist": {1.0: lens}})["mnist"][1.0]
    assert (moved.moves, moved.noise) == (lens.moves, lens.noise)
    plain, other = method(gan, [0.7, 0.72, 0.74]), method(moved, [0.79, 0.8, 0.82])
    text = generated_report.page(method(lens, [0.78, 0.8, 0.82]), plain, other)
    figures = "| 80.0 ± 1.2 (3) | 72.0 ± 1.2 (3) | +8.0 ± 1.6 (DataLens) | 80.3 ± 0.9 (3) | -0.3 ± 1.5 (open) |"
    assert figures in text
    assert text.count("| 601 |") == 4
    assert "| MNIST | 10 | logistic regression | not run | not run |  | not run |  |" in text


def test_gan_counts_the_steps_of_its_discriminator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    records = TensorDataset(torch.rand(100, 1, 14, 14) * 2 - 1, torch.arange(100) % 10)
    seen: dict[str, Any] = {}

    def at_end(module: gan_run.ConditionalGan) -> None:
        seen.update(ledger=module.trainer.strategy.ledger, optimizer_steps=module.trainer.global_step)

    def judged(made: tuple[torch.Tensor, torch.Tensor], held_out: TensorDataset) -> dict[str, float]:
        seen["images"], seen["labels"] = made
        return {"linear": 0.5, "cnn": 0.5}

    monkeypatch.setattr(gan_run, "coarse_split", lambda *_, **__: Split(records, records))
    monkeypatch.setattr(gan_run, "keep_samples", lambda *_: None)
    monkeypatch.setattr(gan_run, "judged", judged)
    monkeypatch.setattr(gan_run.ConditionalGan, "on_train_end", at_end)
    line = gan_run.execute(replace(gan_run.START, every=3, batch=20, epochs=3, moves=1.0, noise=0.3))
    assert 0.95 < line["spent"] <= 1.0
    assert line["steps"] == seen["ledger"].num_steps == 15
    assert seen["ledger"].neighboring_relation == "replace_one"
    assert seen["optimizer_steps"] == 15 + 6  # the generator at batches 0 and 3 of each of three epochs
    assert seen["images"].shape == (lens_run.SAMPLES, 1, 14, 14)
    assert float(seen["images"].abs().max()) <= 1
    assert seen["labels"].bincount().tolist() == [lens_run.SAMPLES // 10] * 10


def test_kinds_depend_on_one_image_alone() -> None:
    images = torch.rand(50, 1, 14, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = prototypes.kinds(images, 3)
    assert set(together.tolist()) == set(range(8))
    assert together[7:8].equal(prototypes.kinds(images[7:8], 3))


def test_matching_teachers_vote_for_their_own_records() -> None:
    records = torch.rand(2, 3, 1, 14, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shards = Shards(records, torch.tensor([[0, 0, 0], [0, 0, 1]]))
    teachers = Teachers(
        prototypes.Matching(3),
        shards,
        numbers=[0, 1],
        lr=1e-3,
        betas=(0.5, 0.999),
        chunk_size=2,
        seed=0,
        device=torch.device("cpu"),
    )
    for _ in range(3):
        teachers.learn(torch.rand(3, 1, 14, 14), torch.tensor([0, 1, 2]), torch.arange(3))
    votes = teachers.sum_of_votes(torch.rand(3, 1, 14, 14), torch.tensor([0, 1, 2]), 196)
    means = [records[0].mean(0), records[1, :2].mean(0), records[1, 2]]
    assert votes[0].equal((means[0].sign() + means[1].sign()).flatten())
    assert votes[1].equal(means[2].sign().flatten())
    assert not votes[2].any()


def test_prototypes_add_up_the_signs_of_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = generated.Lens("mnist", 1.0, 0, 2, 40, 2.0, 0.0, 0.0)
    lens, total = lens_run.lens_of(run, 3), torch.zeros(10, 14, 14)
    monkeypatch.setattr(prototypes, "COEFFICIENTS", 14)
    lens.generator = prototypes.Prototypes(10, moves=0.0, noise=0.0)
    optimizer = lens.configure_optimizers()
    for _ in range(lens_run.STEPS):
        labels = torch.randint(10, (lens.settings.batch_size,))
        images = lens.generator(torch.zeros(len(labels), prototypes.Z_DIM), labels)
        signs = torch.randn(images.shape).sign()
        total.index_add_(0, labels, signs[:, 0])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(images, images.detach() + signs).backward()
        optimizer.step()
    lens.generator.eval()
    shown = lens.generator(torch.zeros(10, prototypes.Z_DIM), torch.arange(10))[:, 0]
    assert (shown - (run.gain * total / run.votes).clamp(-1, 1)).abs().max() < 1e-4


def test_drawn_leaves_out_kinds_at_the_level_of_the_noise() -> None:
    run = generated.Lens("mnist", 1.0, 1, 2, 100, 2.0, 0.0, 0.0)
    coefficients = torch.full((20, 8, 8), 0.3)  # the noise alone: 2^2 / 100 = .2^2
    coefficients[4], coefficients[5] = 1.0, 0.5
    kinds = lens_run.drawn(run, coefficients)
    assert kinds.bincount(minlength=20).view(10, 2).sum(1).sub(1000).abs().max() < 200
    within = kinds[(kinds == 4) | (kinds == 5)]
    assert float((within == 4).double().mean()) == pytest.approx(0.88 / (0.88 + 0.13), abs=0.06)
