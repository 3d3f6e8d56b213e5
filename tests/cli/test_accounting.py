"""``lightning-dp epsilon`` and ``calibrate``: the reference figures through the command, refusals with their reason."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lightning_dp import schedules
from lightning_dp.accounting import ACCOUNTANTS, Ledger, PrivacyEvent, gaussian_epsilon, make_accountant
from lightning_dp.cli import main

RUN = ["--dataset-size", "60000", "--batch-size", "600", "--epochs", "60", "--delta", "1e-5"]


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def answers(reply: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {answer.pop("accountant"): answer for answer in reply["answers"]}


def test_reference_epsilons_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    reply = ask(capsys, "epsilon", *RUN, "--noise-multiplier", "1.1")
    assert (reply["steps"], reply["sample_rate"], reply["delta"]) == (6000, 0.01, 1e-5)
    found = answers(reply)
    assert list(found) == list(ACCOUNTANTS)
    assert found["pld"]["epsilon"] == pytest.approx(3.90, abs=0.005)
    assert found["rdp"]["epsilon"] == pytest.approx(4.25, abs=0.005)
    assert found["prv"]["epsilon"] == pytest.approx(3.91, abs=0.005)
    for name, why in (("gdp", "Expected releases without sampling"), ("tcdp", "Expected noise_multiplier >= 2.24")):
        assert found[name]["epsilon"] is None
        assert found[name]["reason"].startswith(why)


def test_table_shows_what_json_holds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["epsilon", *RUN, "--noise-multiplier", "1.1", "--accountant", "rdp", "--accountant", "gdp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6000 steps on 60000 records, expected batch size 600, Poisson sampling at rate 0.01")
    rows = [line.split() for line in lines[2:]]
    assert rows[0] == ["accountant", "epsilon", "note"]
    assert rows[1][:2] == ["rdp", "4.2466"]
    assert rows[2][:4] == ["gdp", "-", "Expected", "releases"]
    assert all(len(line) <= 60 for line in lines[2:])
    assert not any(line.startswith("pld") for line in lines)


@pytest.mark.slow
def test_schedule_counts_every_step_with_its_own_noise(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--dataset-size", "1000", "--batch-size", "100", "--epochs", "8", "--noise-multiplier", "2"]
    found = answers(ask(capsys, "epsilon", *run, "--schedule", "step:0.5:4", "--accountant", "rdp"))
    ledger = Ledger()
    for sigma, steps in ((2.0, 40), (1.0, 40)):
        ledger.record(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=0.1), steps)
    assert found["rdp"]["epsilon"] == pytest.approx(make_accountant("rdp").epsilon(ledger, 1e-4), rel=1e-12)
    on_variance = answers(ask(capsys, "epsilon", *run, "--schedule", "step:rate=0.25:4", "--accountant", "rdp"))
    assert on_variance["rdp"]["epsilon"] == pytest.approx(found["rdp"]["epsilon"], rel=1e-12)
    cosine = answers(ask(capsys, "epsilon", *run, "--schedule", "cosine:0.5", "--accountant", "rdp"))
    ledger = Ledger()
    for factor, steps in schedules.runs(schedules.cosine(0.5, over=70, every=10), 0, 80):
        ledger.record(PrivacyEvent.poisson(noise_multiplier=2 * factor, sample_rate=0.1), steps)
    assert cosine["rdp"]["epsilon"] == pytest.approx(make_accountant("rdp").epsilon(ledger, 1e-4), rel=1e-12)


def test_calibrated_noise_meets_the_target_from_below(capsys: pytest.CaptureFixture[str]) -> None:
    found = answers(
        ask(capsys, "calibrate", *RUN, "--target-epsilon", "3", *(f"--accountant={a}" for a in ("pld", "rdp", "gdp")))
    )
    for name in ("pld", "rdp"):
        ledger = Ledger()
        event = PrivacyEvent.poisson(noise_multiplier=found[name]["noise_multiplier"], sample_rate=0.01)
        ledger.record(event, 6000)
        assert found[name]["epsilon"] == pytest.approx(make_accountant(name).epsilon(ledger, 1e-5), rel=1e-6)
        assert 2.97 <= found[name]["epsilon"] <= 3
    assert found["rdp"]["noise_multiplier"] > found["pld"]["noise_multiplier"]
    assert found["gdp"]["noise_multiplier"] is None
    assert "without sampling" in found["gdp"]["reason"]


def test_shuffled_batches_and_other_relations(capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--dataset-size",
        "1000",
        "--batch-size",
        "100",
        "--epochs",
        "4",
        "--noise-multiplier",
        "2",
        "--delta",
        "1e-5",
    ]
    shuffled = answers(ask(capsys, "epsilon", *run, "--sampling", "shuffle", "--accountant", "gdp"))
    assert shuffled["gdp"]["epsilon"] == pytest.approx(4.377178, abs=1e-5)  # mu^2 = 4 passes / 2^2
    replaced = answers(ask(capsys, "epsilon", *run, "--neighboring-relation", "replace_one"))
    assert replaced["pld"]["epsilon"] > 0
    assert "replace_one" in replaced["rdp"]["reason"]


def test_shuffled_batches_are_a_random_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--dataset-size",
        "60000",
        "--batch-size",
        "600",
        "--epochs",
        "10",
        "--delta",
        "1e-5",
        "--sampling",
        "shuffle",
    ]
    reply = ask(capsys, "epsilon", *run, "--noise-multiplier", "2")
    assert (reply["batches_per_pass"], reply["sample_rate"]) == (100, None)
    found = answers(reply)
    assert found["pld"]["epsilon"] == pytest.approx(0.6045, rel=6e-3)
    assert found["gdp"]["epsilon"] == pytest.approx(gaussian_epsilon(math.sqrt(10) / 2, 1e-5), rel=1e-9)
    calibrated = answers(ask(capsys, "calibrate", *run, "--target-epsilon", "0.6045", "--accountant", "pld"))
    assert calibrated["pld"]["noise_multiplier"] == pytest.approx(2, rel=5e-3)
    assert main(["epsilon", *run, "--noise-multiplier", "2", "--accountant", "gdp"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shuffled batches (random allocation to 100 batches per pass)" in shown
    assert "a pass counts as one Gaussian, without amplification" in shown
    assert (
        main(["epsilon", *run, "--noise-multiplier", "2", "--neighboring-relation", "zero_out", "--accountant=gdp"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "shuffled batches without amplification" in shown
    assert "exact" in shown


@pytest.mark.slow
def test_cost_for_a_user_is_printed_beside_that_for_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    run = [
        "--dataset-size",
        "1000",
        "--batch-size",
        "10",
        "--steps",
        "200",
        "--delta",
        "1e-5",
        "--noise-multiplier",
        "1",
    ]
    reply = ask(capsys, "epsilon", *run, "--records-per-user", "2", "--accountant", "pld")
    assert (reply["records_per_user"], reply["user_epsilon"]) == (2, pytest.approx(1.9467, abs=1e-4))
    assert reply["answers"][0]["epsilon"] == pytest.approx(0.9127, rel=1e-3)
    shuffled = [*run, "--sampling", "shuffle", "--accountant", "pld", "--records-per-user", "2"]
    assert main(["epsilon", *shuffled]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    expected = gaussian_epsilon(2 * math.sqrt(2), 1e-5)  # two passes, two records
    assert last.startswith("epsilon ")
    assert float(last.split()[1]) == pytest.approx(expected, rel=1e-3)
    assert "for a user with at most 2 records" in last
    assert "without amplification" in last
    assert "user_epsilon" not in ask(capsys, "epsilon", *run, "--accountant", "pld")
    assert main(["epsilon", *run, "--records-per-user", "0"]) == 2
    assert "got records_per_user=0" in capsys.readouterr().err


def test_steps_in_place_of_epochs_and_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--dataset-size", "1000", "--batch-size", "300", "--noise-multiplier", "0"]
    assert ask(capsys, "epsilon", *run, "--epochs", "2")["steps"] == 6
    reply = ask(capsys, "epsilon", *run, "--steps", "7")
    assert (reply["steps"], reply["delta"]) == (7, 1e-4)
    assert {answer["epsilon"] for answer in reply["answers"]} == {"inf"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset-size", "10", "--batch-size", "20"], "Expected batch_size <= dataset_size, got batch_size=20"),
        (["--dataset-size", "0", "--batch-size", "20"], "Expected dataset_size >= 1"),
        (["--dataset-size", "100", "--batch-size", "20", "--delta", "nan"], "Expected 0 < delta < 1"),
        (["--dataset-size", "100", "--batch-size", "20", "--schedule", "step:x"], "Expected a schedule KIND"),
        (["--dataset-size", "100", "--batch-size", "20", "--schedule", "step:0.9:1:1"], "Expected a schedule KIND"),
        (["--dataset-size", "100", "--batch-size", "20", "--schedule", "hill:0.9"], "Expected kind to be one of"),
        (["--dataset-size", "100", "--batch-size", "20", "--schedule", "step:-1"], "Expected 0 < factor < inf"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["epsilon", "--noise-multiplier", "1", "--epochs", "1", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"lightning-dp epsilon: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epsilon", "--epochs", "3"], "the following arguments are required: --noise-multiplier"),
        (["epsilon", *RUN, "--noise-multiplier", "much"], "invalid float value: 'much'"),
        (["calibrate", *RUN], "required: --target-epsilon"),
        (["calibrate", *RUN, "--steps", "3", "--target-epsilon", "3"], "not allowed with argument"),
        (["spend"], "invalid choice: 'spend'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.count("\n") == 1


def test_users_are_counted_in_place_of_records(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["epsilon", *RUN, "--noise-multiplier", "1.1", "--accountant", "rdp", "--unit", "user"]
    assert ask(capsys, *run)["unit"] == "user"
    assert main(run) == 0
    assert capsys.readouterr().out.startswith("6000 steps on 60000 users")
    assert main([*run, "--records-per-user", "4"]) == 2
    assert "Expected a run that protects records for records_per_user" in capsys.readouterr().err


def test_correlated_noise_is_one_gaussian(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--dataset-size", "1000", "--batch-size", "100", "--epochs", "10", "--delta", "1e-5", "--sampling", "cyclic"]
    reply = ask(capsys, "epsilon", *run, "--noise-multiplier", "1", "--correlated", "0.9")
    assert reply["correlation"] == {"decay": 0.9, "bands": None, "steps": 100, "separation": 10, "passes": 10}
    assert answers(reply)["gdp"]["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 1e-5))
    independent = answers(ask(capsys, "epsilon", *run, "--noise-multiplier", "1"))
    assert independent["gdp"]["epsilon"] == pytest.approx(gaussian_epsilon(10**0.5, 1e-5))
    found = answers(ask(capsys, "calibrate", *run, "--target-epsilon", "2", "--correlated", "bands=4"))
    assert 1.98 <= found["pld"]["epsilon"] <= 2.0
    assert main(["epsilon", *run, "--noise-multiplier", "1", "--correlated", "auto"]) == 0
    assert "correlated between steps (decay 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--correlated", "0.9"], "Expected sampling=cyclic without a schedule for correlated noise"),
        (["--sampling", "cyclic", "--correlated", "bends=3"], "Expected auto, a decay or bands=P"),
        (["--sampling", "cyclic", "--correlated", "1.5"], "Expected 0 <= decay < 1"),
    ],
)
def test_correlated_noise_is_refused_by_reason(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["epsilon", *RUN, "--noise-multiplier", "1", *options]) == 2
    assert message in capsys.readouterr().err
