"""Two gloo processes with sharded parameters: they release what one process releases, and talk alike whatever they
drew.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dp import AutoThreshold, DPFSDPStrategy, DPStrategy
from tests.helpers import Classifier, Recorder, make_dataset, make_trainer
from tests.processes import run_script, run_two_ranks
from tests.strategies.sharded import CASES, REPEATED, Sharded, plain
from tests.strategies.test_private_step import clipped_sum

SCRIPT = Path(__file__).with_name("fsdp_run.py")
PARTS = ("sums", "noise", "releases", "training", "spoiled", "refused", "saving")
SLOW_PARTS = ("manual", "meta", "skipped", "communication", "planned", "repeated_sums", "checked_training")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down."""
    return run_two_ranks(SCRIPT, tmp_path_factory, *PARTS)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks wrote down of the parts that only slow tests read."""
    return run_two_ranks(SCRIPT, tmp_path_factory, *SLOW_PARTS)


@pytest.fixture(scope="module")
def folder(ranks: list[dict[str, Any]]) -> Path:
    """The folder of the processes' checkpoints."""
    return Path(ranks[0]["folder"])


@pytest.mark.parametrize("name", [name for name in CASES if name not in REPEATED])
def test_ranks_release_the_sum_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    """All 64 records take part, without noise."""
    check_sums([seen["sums"][name] for seen in ranks], tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPEATED)
def test_sums_of_further_cases_are_those_of_one_process(rest: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    check_sums([seen["repeated_sums"][name] for seen in rest], tmp_path, name)


@pytest.mark.slow
def test_checks_pass_on_every_network_and_precision(tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, "checked_sums", folder=tmp_path, ranks=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)["checked_sums"] for rank in (0, 1)]
    assert len(ranks[0]) == 4
    for name in ranks[0]:
        check_sums([seen[name] for seen in ranks], tmp_path, name)


def check_sums(found: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    """What each rank released is the sum of one process."""
    network, _, options, callbacks, trainer_options = CASES[name]
    recorder: Any = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=0.7, check_per_sample=False, **options)
    batch_size = 64 // trainer_options.get("accumulate_grad_batches", 1)
    module: L.LightningModule = Sharded(network(), lr=0.0)
    trainer = make_trainer(strategy, tmp_path, max_steps=1, callbacks=[*callbacks(), recorder], **trainer_options)
    trainer.fit(module, DataLoader(make_dataset(), batch_size=batch_size))
    expected = recorder.before_step[0]
    rtol, atol = (5e-2, 1e-3) if name == "bfloat16" else (1e-5, 1e-7)
    for seen in found:
        assert seen.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert bool(gradient.any())
            torch.testing.assert_close(seen[parameter], gradient, rtol=rtol, atol=atol)


@pytest.mark.slow
def test_manual_steps_release_what_automatic_ones_do(ranks: list[dict[str, Any]], rest: list[dict[str, Any]]) -> None:
    for automatic, seen in zip(ranks, rest, strict=True):
        assert seen["manual"]["steps"] == 20
        for name, gradient in automatic["sums"]["flat"].items():
            torch.testing.assert_close(seen["manual"]["sum"][name], gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(rest[0]["manual"]["weights"], rest[1]["manual"]["weights"])


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_noise_is_there_once_on_rows_and_on_replicas(ranks: list[dict[str, Any]], wrong: float) -> None:
    """12 steps x 53 sharded and 3 replicated coordinates; z under 5 (false alarm < 1e-6)."""
    assert torch.equal(ranks[0]["noise"], ranks[1]["noise"])
    noise = ranks[0]["noise"].double() * 64 / wrong
    assert noise.shape == (12, 56)
    z = float((noise.square().sum() - noise.numel()) / math.sqrt(2 * noise.numel()))
    assert (abs(z) < 5) == (wrong == 1.0)


@pytest.mark.parametrize("wrong", [1.0, 2 / 3, 3 / 2, math.sqrt(2), math.sqrt(0.5)])
def test_every_coordinate_carries_noise_once(ranks: list[dict[str, Any]], wrong: float) -> None:
    """600 releases of every row of each rank and of 3 replicated coordinates; z under 5.5 (false alarm 59 x 4e-8)."""
    for seen in ranks:
        noise = seen["releases"].double() / 1.5 / wrong
        z = (noise.square().sum(0) - len(noise)) / math.sqrt(2 * len(noise))
        assert bool((z.abs() < 5.5).all()) == (wrong == 1.0)
        assert bool((z.abs() < 5.5).any()) == (wrong == 1.0)


def test_rows_have_streams_of_their_own_and_replicas_one_sum(ranks: list[dict[str, Any]]) -> None:
    """53 coordinates over both ranks; correlations of any two under 6 standard errors (false alarm 1,378 x 2e-9)."""
    first, second = (seen["releases"] for seen in ranks)
    assert torch.equal(first[:, -3:], second[:, -3:])
    rows = torch.cat([first[:, :-3], second[:, :-3]], 1)
    assert rows.shape == (600, 53)
    correlation = torch.corrcoef(rows.double().T) - torch.eye(53)
    assert float(correlation.abs().max()) < 6 / math.sqrt(600)


@pytest.mark.parametrize(
    ("run", "part"), [("ranks", "training"), pytest.param("rest", "checked_training", marks=pytest.mark.slow)]
)
def test_empty_and_unequal_batches_keep_ranks_together(request: pytest.FixtureRequest, run: str, part: str) -> None:
    """5 steps over batches of 2 records per rank on average, in microbatches of 2."""
    first, second = (seen[part] for seen in request.getfixturevalue(run))
    assert first["steps"] == second["steps"] == (5, 5)
    sizes = list(zip(first["sizes"], second["sizes"], strict=True))
    assert {(one > 0, other > 0) for one, other in sizes} >= {(False, True), (True, False), (True, True)}
    assert torch.equal(first["weights"], second["weights"])
    assert first["epsilon"] == second["epsilon"]
    assert first["epsilon"][0] == pytest.approx(first["epsilon"][1])


@pytest.mark.slow
def test_module_on_the_meta_device_is_trained(rest: list[dict[str, Any]]) -> None:
    first, second = (seen["meta"] for seen in rest)
    assert first["steps"] == second["steps"] == 4
    assert bool(first["weights"].isfinite().all())
    assert first["weights"].unique().numel() > 40
    assert torch.equal(first["weights"], second["weights"])


def test_record_that_is_not_finite_counts_as_nothing(ranks: list[dict[str, Any]]) -> None:
    features, labels = make_dataset().tensors
    kept = torch.arange(64) != 7
    expected = clipped_sum(Classifier(), features[kept], labels[kept], max_grad_norm=1.0)
    for seen in ranks:
        for name, gradient in seen["spoiled"].items():
            torch.testing.assert_close(gradient, expected[name] / 64, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_step_without_a_loss_is_taken_by_all_ranks_or_refused(rest: list[dict[str, Any]]) -> None:
    for seen in rest:
        assert seen["skipped"]["everywhere"] == 4
        assert (
            "PrivacyError: Expected training_step to return None for every sample or for none"
            in (seen["skipped"]["on one rank"])
        )


@pytest.mark.slow
def test_microbatch_gathers_twice_and_scatters_once(rest: list[dict[str, Any]]) -> None:
    """Three microbatches of a module of P parameters; flags that keep ranks together are a few whole numbers."""
    num_parameters = 6 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4
    for seen in rest:
        sent = seen["communication"]["sent"]
        assert sum(sent["all_gather"]) == 3 * 2 * num_parameters
        assert sum(sent["reduce_scatter"]) == 3 * num_parameters
        assert sum(sent["all_reduce"]) <= 3 * 10


@pytest.mark.slow
def test_sums_take_a_share_of_the_model_and_one_unit(rest: list[dict[str, Any]]) -> None:
    num_parameters, unit = 6 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4, 64 * 64 + 64
    for seen in rest:
        assert seen["communication"]["own"] == num_parameters // 2
        assert seen["communication"]["largest"] == unit


@pytest.mark.slow
def test_target_budget_and_statement_hold_for_all_ranks(rest: list[dict[str, Any]]) -> None:
    first, second = (seen["planned"] for seen in rest)
    assert first == second
    assert 2.9 < first["target"] <= 3.0
    assert "Privacy: (epsilon=" in first["statement"]
    assert {"privacy_card.json", "privacy_card.md"} <= set(first["card"])
    assert first["budget"][0] <= 2.5
    assert 0 < first["budget"][1] < 200


def test_resume_goes_on_with_ledger_and_weights(ranks: list[dict[str, Any]]) -> None:
    """Also after a death between the two renames of a move, and from a whole file."""
    for seen in ranks:
        saving = seen["saving"]
        assert saving["steps"] == [8, 12, 8]
        assert saving["from full"] == 12
        assert len(saving["lineages"]) == 1
        for name, weight in saving["weights"].items():
            assert torch.equal(weight, saving["recovered"][name])
        assert saving["mixed"].startswith(
            "PrivacyError: Expected the ledger that was written with the weights of mixed.ckpt"
        )


def test_file_of_a_rank_from_another_checkpoint_is_refused(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["saving"]["parts of two"].startswith(
            "PrivacyError: Expected the ledger that was written with the weights of parts of two.ckpt"
        )


def test_whole_checkpoint_of_stateless_sgd_resumes(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["saving"]["stateless"] == {"same": True, "rate": 0.05, "steps": 8}


def test_whole_copy_of_sharded_weights_is_recognised(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "was trained by an earlier private run of" in seen["saving"]["copied"]


def test_whole_checkpoint_loads_in_a_plain_module(ranks: list[dict[str, Any]], folder: Path) -> None:
    checkpoint = torch.load(folder / "full.ckpt", weights_only=True)
    module = Classifier()
    module.load_state_dict(checkpoint["state_dict"])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, ranks[0]["saving"]["weights"][name])
    assert checkpoint["lightning_dp"]["ledger"]["num_steps"] == 8


def test_history_reads_the_folder_of_a_sharded_run(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks
    strategy = DPStrategy(noise_multiplier=1.0, history=folder / "parts.ckpt")
    assert strategy.ledger.num_steps == 8


@pytest.mark.slow
def test_another_number_of_processes_resumes(tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, "planned", "saving", folder=tmp_path, ranks=2)
    run_script(SCRIPT, tmp_path, "resumed_alone", folder=tmp_path)
    alone = torch.load(tmp_path / "alone0.pt", weights_only=False)["resumed_alone"]
    assert alone["world_size"] == 1
    assert alone["steps"] == 12
    epsilon, steps = alone["target"]  # the second epoch has 8 steps of half the size, with noise of its own
    assert 2.9 < epsilon <= 3.0
    assert steps == [4, 8]
    saved = torch.load(tmp_path / "rank0.pt", weights_only=False)["saving"]
    for name, weight in saved["weights"].items():
        assert torch.equal(alone["weights"][name], weight)


@pytest.mark.slow
def test_learned_bounds_see_the_gradient_of_all_ranks(rest: list[dict[str, Any]], tmp_path: Path) -> None:
    """The bound that follows the norm is that of one process; the one that counts is the same everywhere."""
    learned = AutoThreshold()
    trainer = make_trainer(DPStrategy(noise_multiplier=0.0), tmp_path, callbacks=[learned], max_epochs=2)
    trainer.fit(Sharded(plain(), lr=0.0), DataLoader(make_dataset(), batch_size=64))
    first, second = (seen["planned"] for seen in rest)
    assert first["learned"] == second["learned"] == pytest.approx(learned.bound.value, rel=1e-5)
    assert first["counted"] == second["counted"] != 1.0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no unit", "ValueError: Expected Whole.configure_model to shard the module"),
        ("single", "ValueError: Expected samples to run together in a sharded module, got microbatch_size=1"),
        ("top_agg", "a sharded module"),
        ("public", "ValueError: Expected private optimizers only in a sharded module"),
        ("stream", "Expected a map-style dataset for Poisson sampling"),
        ("canaries", "ValueError: Expected sums that no process holds whole, got canaries in gradient space"),
        ("diagnostics", "ValueError: Expected sums that no process holds whole, got GradientDiagnostics"),
        ("correlated", "ValueError: Expected independent noise in a sharded module"),
        ("columns", "ValueError: Expected parameters sharded along their first axis over all 2 processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused_on_every_rank(ranks: list[dict[str, Any]], what: str, message: str) -> None:
    for seen in ranks:
        assert message in seen["refused"][what]


def test_tensor_parallel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Expected tensor_parallel_size=1, got tensor_parallel_size=2"):
        DPFSDPStrategy(noise_multiplier=1.0, tensor_parallel_size=2).setup_environment()


def test_layers_are_not_replaced_once_they_are_sharded() -> None:
    with pytest.raises(ValueError, match="Expected fix=False with sharded parameters, got fix=True"):
        DPFSDPStrategy(noise_multiplier=1.0, fix=True).setup_environment()
