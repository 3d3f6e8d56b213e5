"""Two gloo processes: teachers split, votes summed, noise once, equal replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp.datalens import epsilon_after
from tests.datalens.helpers import fit, make_model
from tests.datalens.test_release import has_std
from tests.processes import run_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down."""
    return run_two_ranks(Path(__file__).with_name("ddp_run.py"), tmp_path_factory, weights_only=True)


def test_split_teachers_vote_as_one_process(
    ranks: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step, before rounding in the generator's averaged gradients can tell the runs apart."""
    assert [seen["num_own"] for seen in ranks] == [3, 2]
    model = make_model(num_teachers=5, sigma=0.0)
    alone: list[torch.Tensor] = []
    original = type(model)._noisy_votes
    monkeypatch.setattr(
        type(model), "_noisy_votes", lambda self, *a: alone.append(original(self, *a).clone()) or alone[-1]
    )
    fit(model, tmp_path, max_steps=1)
    for seen in ranks:
        assert seen["votes"].shape == (6, 4, 3)
        assert torch.equal(seen["votes"][0], alone[0])
        assert float(alone[0].abs().sum()) > 0


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, 2**0.5, 0.5**0.5])
def test_noise_is_there_exactly_once(ranks: list[dict[str, Any]], wrong: float) -> None:
    """60 steps x 120 coordinates of std 1e4, next to which 5 votes are nothing; false alarm 2e-8."""
    noise = ranks[0]["noise"]
    assert noise.shape == (60, 40, 3)
    assert has_std(noise, 1e4 * wrong) == (wrong == 1.0)
    assert torch.equal(noise, ranks[1]["noise"])


def test_replicas_ledgers_and_epsilon_agree(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["ledger"] == ranks[1]["ledger"]
    for seen in ranks:
        assert seen["epsilon"] == pytest.approx(epsilon_after(60, sigma=1e4, top_k=2, batch_size=40, delta=1e-5))
        assert seen["resumed"] == 66
