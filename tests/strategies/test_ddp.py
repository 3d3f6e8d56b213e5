"""Two gloo processes: noise once, one Poisson sample over both ranks, equal replicas, no deadlock on empty batches."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import DPDDPStrategy
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_dataset
from tests.processes import run_script, run_two_ranks
from tests.strategies.test_private_step import clipped_sum

SCRIPT = Path(__file__).with_name("ddp_run.py")
RUNS = ["ranks", pytest.param("checked", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down."""
    return run_two_ranks(SCRIPT, tmp_path_factory)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down where samples are checked."""
    return run_two_ranks(SCRIPT, tmp_path_factory, "checked")


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_noise_of_the_reduced_gradient_is_there_exactly_once(ranks: list[dict[str, Any]], wrong: float) -> None:
    """12 steps x 53 coordinates; z under 5 (false alarm < 1e-6); noise drawn by both ranks or by half would be sqrt(2)
    off.
    """
    noise = ranks[0]["noise"].double() * 64 / wrong
    assert noise.shape == (12, 53)
    z = (noise.square().sum() - noise.numel()) / math.sqrt(2 * noise.numel())
    assert (abs(z) < 5) == (wrong == 1.0)
    assert torch.equal(ranks[0]["noise"], ranks[1]["noise"])


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_masked_gradient_and_count_share_one_noise(ranks: list[dict[str, Any]], wrong: float) -> None:
    """40 steps of B = 4 at z = 1, so s_b = 1 and z_g = (1 - 1/4)^-1/2; z under 5 (false alarm < 1e-5).

    Noise of both ranks, or of half, would be sqrt(2) off. The next test has counts enough to see that in them.
    """
    mixed = [seen["mixed"] for seen in ranks]
    assert torch.equal(mixed[0]["noise"], mixed[1]["noise"])
    assert mixed[0]["counts"] == mixed[1]["counts"]
    noise, std = mixed[0]["noise"].double() * 4, torch.tensor(mixed[0]["std"], dtype=torch.float64)
    assert noise.shape == (40, 53)
    live = noise != 0
    assert live.sum(1).tolist() == [27] * 40
    assert std[0] == pytest.approx(0.75**-0.5)  # the bound is still 1; it shrinks, since no norm is above it
    assert std[-1] < 0.5
    drawn = (noise / std[:, None])[live] / wrong
    z = (drawn.square().sum() - drawn.numel()) / math.sqrt(2 * drawn.numel())
    assert (abs(z) < 5) == (wrong == 1.0)
    sizes = torch.tensor([a + b for a, b in zip(mixed[0]["sizes"], mixed[1]["sizes"], strict=True)])
    error = torch.tensor(mixed[0]["counts"], dtype=torch.float64) - sizes / 2
    assert abs(error.square().sum() - 40) / math.sqrt(80) < 5


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_every_coordinate_and_count_carries_noise_once(ranks: list[dict[str, Any]], wrong: float) -> None:
    """600 releases of 30 active coordinates and 2 counts; each z under 5.5 (false alarm 32 x 4e-8)."""
    first, second = (seen["releases"].double() / wrong for seen in ranks)
    assert torch.equal(first, second)
    noise = first / torch.tensor([1.5] * 30 + [0.5] * 2)
    z = (noise.square().sum(0) - 600) / math.sqrt(1200)
    assert bool((z.abs() < 5.5).all()) == (wrong == 1.0)
    assert bool((z.abs() < 5.5).any()) == (wrong == 1.0)


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_correlated_noise_of_ranks_is_that_of_one(ranks: list[dict[str, Any]], wrong: float) -> None:
    """12 steps x 53 coordinates: v_t + .8 z_{t-1} are independent of std 1; z under 5 (false alarm < 1e-6)."""
    first, second = (seen["correlated"].double() / wrong for seen in ranks)
    assert torch.equal(first, second)
    assert first.shape == (12, 53)
    drawn = [first[0]]
    for step in first[1:]:
        drawn.append(step + 0.8 * drawn[-1])
    noise = torch.stack(drawn)
    z = float((noise.square().sum() - noise.numel()) / math.sqrt(2 * noise.numel()))
    assert (abs(z) < 5) == (wrong == 1.0)
    together = float((noise[1:] * noise[:-1]).mean()) * wrong**2 * math.sqrt(11 * 53)
    assert abs(together) < 5


@pytest.mark.parametrize("run", RUNS)
def test_replicas_are_bit_equal_after_20_steps(request: pytest.FixtureRequest, run: str) -> None:
    ranks = request.getfixturevalue(run)
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert not torch.equal(ranks[0]["weights"], torch.cat([p.detach().flatten() for p in Classifier().parameters()]))
    assert torch.equal(ranks[0]["gan"], ranks[1]["gan"])


@pytest.mark.parametrize("run", RUNS)
def test_ledger_and_epsilon_speak_of_the_whole_batch(request: pytest.FixtureRequest, run: str) -> None:
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="poisson", noise_multiplier=1.0, sample_rate=16 / 64), 20)
    for seen in request.getfixturevalue(run):
        assert seen["ledger"] == ledger.state_dict()["entries"]
        assert seen["epsilon"] == pytest.approx(make_accountant("pld").epsilon(ledger, 1e-3))
        assert seen["resumed"] == 24


def test_sum_over_ranks_is_the_clipped_sum_of_all(ranks: list[dict[str, Any]]) -> None:
    expected = clipped_sum(Classifier(), *make_dataset().tensors, max_grad_norm=1.4)
    for name, gradient in ranks[0]["sum"].items():
        torch.testing.assert_close(gradient, expected[name] / 64, rtol=1e-4, atol=1e-6)


def test_ranks_choose_one_at_a_time_together(ranks: list[dict[str, Any]]) -> None:
    """Rules could follow the module of rank 1; that of rank 0 they cannot."""
    expected = clipped_sum(Classifier(), *make_dataset().tensors, max_grad_norm=1.4)
    for rank in ranks:
        runs_alone, seen = rank["alone"]
        assert runs_alone
        for name, gradient in seen.items():
            torch.testing.assert_close(gradient, expected[name] / 64, rtol=1e-4, atol=1e-6)


def test_users_are_clipped_once_over_ranks_and_microbatches(ranks: list[dict[str, Any]]) -> None:
    """16 users of 1 and 7 records: the mean gradient of each, clipped, whatever rank it is on."""
    features, labels = make_dataset().tensors
    first, rest = torch.arange(0, 64, 8), torch.arange(64).reshape(8, 8)[:, 1:]
    users = [*first[:, None], *rest]
    total = {name: torch.zeros_like(gradient) for name, gradient in ranks[0]["users"].items()}
    for records in users:
        module = Classifier()
        module.training_step((features[records], labels[records]), 0).backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        for name, parameter in module.named_parameters():
            total[name] += parameter.grad * min(1.0, 0.7 / float(norm)) / 16
    for name, gradient in ranks[0]["users"].items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=1e-6)


def test_options_of_the_wrapper_are_accepted_or_refused_by_name() -> None:
    DPDDPStrategy(noise_multiplier=1.0, find_unused_parameters=True, gradient_as_bucket_view=True, static_graph=False)
    for name in ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period"):
        with pytest.raises(ValueError, match=f"Expected no {name}, got {name}=3"):
            DPDDPStrategy(noise_multiplier=1.0, **{name: 3}).setup_environment()
    with pytest.raises(TypeError, match="got delay_all_reduce_named_params=1"):
        DPDDPStrategy(noise_multiplier=1.0, delay_all_reduce_named_params=1)


def test_one_all_reduce_a_logical_step(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["reduced"] == (8, 8, 53)


def test_ranks_with_unequal_microbatches_log_together(ranks: list[dict[str, Any]]) -> None:
    """The value of each step is the mean over ranks of what their real calls logged, each of one microbatch."""
    given = torch.tensor([seen["synced"]["given"] for seen in ranks], dtype=torch.float64)
    assert given.shape == (2, 4 * 3)
    assert (given[0] != given[1]).sum() > 6
    for seen in ranks:
        assert seen["synced"]["steps"] == 4 * 3
        assert seen["synced"]["values"] == given.mean(0).tolist()


@pytest.mark.parametrize(
    "start_method",
    [
        pytest.param("spawn", marks=pytest.mark.slow),
        pytest.param("fork", marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")),
    ],
)
def test_started_processes_bring_their_ledger_home(tmp_path: Path, start_method: str) -> None:
    """What the main process saves afterwards must hold the steps that made the weights; later runs count them."""
    printed = run_script(Path(__file__).with_name("spawn_run.py"), tmp_path, start_method, folder=tmp_path)
    assert printed.split()[-5:] == ["4", "8", "12", "4", "4"]
    checkpoint = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert checkpoint["lightning_dp"]["ledger"]["num_steps"] == 4


def test_union_over_ranks_is_one_poisson_sample(ranks: list[dict[str, Any]]) -> None:
    """Q = 2/41 on each of 41 records over 1600 steps (round(1/q) = 20 a pass, 80 passes): frequencies, sizes,
    independence.

    z of the variance of the sizes is under 5 (false alarm 2e-6, it leans to the right); divided by 3/2 or 2/3 it would
    be 8.4 or 12 standard errors off, so that such a scale is above 5 unless z is above 5 or below -5.
    """
    drawn = torch.zeros(1600, 41, dtype=torch.float64)
    for rank, seen in enumerate(ranks):
        assert len(seen["drawn"]) == 1600
        for step, positions in enumerate(seen["drawn"]):
            assert all(position % 2 == rank for position in positions)
            drawn[step, positions] += 1
    assert drawn.max() == 1
    q = 2 / 41
    frequency_z = (drawn.sum(0) - 1600 * q) / math.sqrt(1600 * q * (1 - q))
    assert float(frequency_z.abs().max()) < 5  # false alarm 41 x 6e-7
    sizes = drawn.sum(1)
    variance = 41 * q * (1 - q)
    error = variance * math.sqrt(2 / 1600 + 1 / (1600 * variance))
    for wrong in (1.0, 2 / 3, 3 / 2):
        assert (abs(float(sizes.var()) / wrong - variance) < 5 * error) == (wrong == 1.0)
    by_rank = torch.stack([drawn[:, 0::2].sum(1), drawn[:, 1::2].sum(1)])
    assert abs(float(torch.corrcoef(by_rank)[0, 1])) < 5 / math.sqrt(1600)
