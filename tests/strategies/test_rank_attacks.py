"""User code and data that would break the guarantee on several processes only: refused alike on every rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_two_ranks
from tests.strategies.sharded import ALSO_SHARDED, NOT_SHARDED

pytestmark = pytest.mark.slow

COUPLED = "ComparisonError: Expected the gradient of every sample in a batch to be its gradient when run alone"
SETTINGS = "PrivacyError: Expected the same settings on every rank, got different values of "
DATA = "PrivacyError: Expected the same dataset in the same order on every rank, got other records at 16 of 16"

#: attack -> beginning of the message
REFUSED = {
    "loss of all ranks": COUPLED,
    "loss of the other rank": COUPLED,
    "gathered loss": COUPLED,
    "loss of rank 0": COUPLED,
    "later": "ComparisonError: One sample of a batch was exchanged for another record",
    "hook": COUPLED,
    "shuffled": DATA,
    "halves": DATA,
    "longer": f"{SETTINGS}dataset_size, sample_rate.",
    "users": "PrivacyError: Expected the same users on every rank",
    "stream": "PrivacyError: Expected a stream to give each rank records of its own",
    "batch size": f"{SETTINGS}expected_batch_size, sample_rate, steps",
    "bound": f"{SETTINGS}max_grad_norm, clipping, releases.",
    "noise": f"{SETTINGS}noise_multiplier, releases.",
    "schedule": f"{SETTINGS}schedule, callbacks",
    "moved": "PrivacyError: Expected equal replicas, got different values of 'shift'",
    "plateau": "PrivacyError: Expected equal replicas, got different values of 'the learning rate of optimizer 0",
    "share": COUPLED,
    "next to one": COUPLED,
    "gathered figure": COUPLED,
    "mean of a figure": COUPLED,
    "next to none": "PrivacyError: The gradient of a record changes with what training_step saw before",
    "rare": "PrivacyError: The gradient of a record changes with what training_step saw before",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down."""
    return run_two_ranks(Path(__file__).with_name("rank_attacks_run.py"), tmp_path_factory)


@pytest.fixture(scope="module")
def sharded_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down of the rest, under FSDP."""
    return run_two_ranks(Path(__file__).with_name("rank_attacks_fsdp_run.py"), tmp_path_factory)


@pytest.fixture(params=["ddp", "fsdp"])
def of_kind(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What both ranks wrote down under one strategy."""
    found = request.getfixturevalue("ranks" if request.param == "ddp" else "sharded_ranks")
    return [seen[request.param] for seen in found]


@pytest.mark.parametrize(
    ("kind", "name"), [*(("ddp", name) for name in REFUSED), *(("fsdp", name) for name in ALSO_SHARDED)]
)
def test_what_ranks_do_apart_is_refused_on_both(ranks: list[dict[str, Any]], kind: str, name: str) -> None:
    for seen in ranks:
        assert seen[kind][name].startswith(REFUSED[name])


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in (*ALSO_SHARDED, *NOT_SHARDED)])
def test_other_attacks_are_refused_under_fsdp(sharded_ranks: list[dict[str, Any]], name: str) -> None:
    for seen in sharded_ranks:
        assert seen["fsdp"][name].startswith(REFUSED[name])


def test_collectives_in_microbatches_are_refused_under_ddp(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["ddp"]["collective"].startswith("PrivacyError: Expected no collective of torch.distributed")


def test_ranks_may_talk_through_lightning_in_microbatches(of_kind: list[dict[str, Any]]) -> None:
    for seen in of_kind:
        assert seen["talking"] == (2, True)


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_noise_follows_neither_seeds_nor_a_resume(of_kind: list[dict[str, Any]], wrong: float) -> None:
    """24 steps x 53 coordinates, half of them after a resume; z under 5 (false alarm < 1e-6).

    Equal draws on both ranks would be sqrt(2) off; draws that come back would correlate.
    """
    first, second = (seen["seeded"].double() * 16 / wrong for seen in of_kind)
    assert torch.equal(first, second)
    assert first.shape == (24, 53)
    z = float((first.square().sum() - first.numel()) / math.sqrt(2 * first.numel()))
    assert (abs(z) < 5) == (wrong == 1.0)
    together = torch.corrcoef(first) - torch.eye(24)
    assert float(together.abs().max()) < 6 / math.sqrt(53)


def test_asking_for_no_synchronisation_changes_nothing(of_kind: list[dict[str, Any]]) -> None:
    (steps, weights), (others, other_weights) = (seen["without_sync"] for seen in of_kind)
    assert steps == others == 8
    assert torch.equal(weights, other_weights)


def test_hooks_on_parameters_of_ranks_see_no_gradient(of_kind: list[dict[str, Any]]) -> None:
    assert [seen["hook_calls"] for seen in of_kind] == [0, 0]
