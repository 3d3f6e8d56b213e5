"""The search, teachers and generator of the DataLens benchmark; nothing is fetched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generated, lens_run, prototypes
from lightning_dp.datalens.shards import Shards
from lightning_dp.datalens.teachers import Teachers


def test_generated_search_keeps_the_best_way_to_draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def execute(run: generated.Lens) -> dict[str, Any]:
        score = 0.5 + 0.01 * run.weighted * (1 if run.epsilon == 10 else -1)
        return {
            "linear": score,
            "cnn": 0.5,
            "spent": run.epsilon,
            "noise_std": 9.0,
            "seconds": 1,
            "processor_seconds": 1,
        }

    monkeypatch.setattr(generated, "execute", execute)
    lines = generated.Lines(tmp_path / "lines")
    found = generated.chosen(lines, math.inf)
    assert found is not None
    assert {epsilon: run.weighted for epsilon, run in found.items()} == {10.0: True, 1.0: False}
    clothes = generated.both(found)["fashion_mnist"]
    assert {(run.data, run.moves, run.weighted) for run in clothes.values()} == {
        ("fashion_mnist", 0.5, True),
        ("fashion_mnist", 0.5, False),
    }
    assert all(run.seed == lens_run.SEARCH_SEED and not run.report for run in lines.lines)
    assert generated.Lines(tmp_path / "lines").lines.keys() == lines.lines.keys()
    assert generated.chosen(generated.Lines(tmp_path / "none"), 0.0) is None


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
