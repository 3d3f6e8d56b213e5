"""The step-cost benchmark: merging, counting, and agreement of its page with its results."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step_machine
from benchmarks.cases import CASES, Case
from benchmarks.readme import README
from benchmarks.step_cost import main
from benchmarks.step_floor import Cost, LayerCost, cost_of
from benchmarks.step_machine import machine_in, measure_noise, measure_rates, merge
from benchmarks.step_processes import DoesNotRun, OwnProcesses
from benchmarks.step_table import best_peer, step_page
from lightning_dp.noise import GaussianNoise

NAMES = ("python", "torch", "lightning", "opacus", "device", "processor", "noise")


def page_of(held: dict[str, Any], **others: Any) -> str:
    """Return the page of one machine that ran one case."""
    machine = {"environment": dict.fromkeys(NAMES, "x"), "days": ["1"], "cases": {"mlp": held}, **others}
    return step_page({"machines": [machine]})


def figures(median: float) -> dict[str, Any]:
    return {"median": median, "min": 1.0, "max": 9.0, "pairs": 7, "plain_ms": 10.0, "clock": "wall", "threads": 2}


def test_the_page_is_what_the_results_give() -> None:
    path = README.with_name("step_cost.json")
    text = step_page(json.loads(path.read_text()))
    assert f"<!-- step_cost -->\n{text}\n<!-- /step_cost -->" in README.read_text()


def test_goals_are_marked_as_met_or_missed() -> None:
    memory = {"ratio": 1.31, "first_bytes": 4e6, "plain_bytes": 3e6}
    held: dict[str, Any] = {"time": {}, "memory": {"ours": memory}, "failed": {"ew": "ValueError: no"}}
    held["time"] = {"ours": figures(1.4), "sparse": figures(1.4), "ghost": figures(2.0), "hooks": figures(9.0)}
    held["to_dense"] = {"sparse": figures(1.21)}
    text = page_of(held)
    assert best_peer(held) == ("ghost", 2.0)
    row = next(line for line in text.splitlines() if line.startswith("| mlp | 10.0"))
    assert "| 1.40 ✓ [≤ 1.4] |" in row
    assert "| 1.31 ✗ [≤ 1.3] |" in row
    assert "| 1.21 ✗ [≤ 1.15] |" in row
    assert "| 1.43 ✗ [≥ 1.5] (ghost) |" in row
    assert "a step without privacy): mlp 4 (3)." in text
    assert "- mlp, ew: does not run (ValueError: no)" in text
    assert "gathers its batches as well" not in text
    assert "Where Opacus itself" not in text
    held["time"] |= {"kept": figures(0.7), "functorch": figures(1.4)}
    text = page_of(held)
    assert "gathers its batches as well: mlp 2.00." in text
    assert "times faster: mlp (functorch 1.40)." in text


def test_claim_over_opacus_needs_all_its_modes() -> None:
    held: dict[str, Any] = {"time": {"ours": figures(1.0), "ghost": figures(1.6)}, "memory": {}, "failed": {}}
    held["time"] |= {"hooks": figures(2.0), "functorch": figures(2.0)}
    assert "| 1.60 ? [≥ 1.5] (ghost) |" in page_of(held)
    held["failed"] = {"ew": "ValueError: no"}
    assert "| 1.60 ✓ [≥ 1.5] (ghost) |" in page_of(held)
    held["failed"], held["time"]["ew"] = {}, figures(1.5)
    assert "| 1.50 ✓ [≥ 1.5] (ew) |" in page_of(held)
    held["time"] = {"ours": figures(1.0), "hooks": figures(1.4)}
    assert "| 1.40 ✗ [≥ 1.5] (hooks) |" in page_of(held)


def test_draws_and_the_least_are_set_beside_a_plain_step() -> None:
    held: dict[str, Any] = {
        "time": {"ours": figures(1.4)},
        "memory": {},
        "failed": {},
        "noise": {"ms": 2.5, "least_ms": 2.0},
    }
    parameters = cost_of(CASES["mlp"]).parameters
    rates = {"mult_per_ms": math.inf, "bytes_per_ms": 4.0 * parameters}  # one pass over all parameters: 1 ms
    assert "| mlp | 10.0 | 2.5 | 1.25 | 1.30 | 1.40 ✓" in page_of(held, rates=rates)
    assert "| mlp | 10.0 | 2.5 | 1.25 | - | 1.40 ✓" in page_of(held)
    del held["noise"]
    assert "| mlp | 10.0 | - | - | - | 1.40 ✓" in page_of(held)


def test_every_machine_has_a_table_and_figures_of_its_own() -> None:
    results: dict[str, Any] = {"machines": []}
    memory = {"ratio": 1.0, "first_bytes": 4e6, "plain_bytes": 3e6}
    one, other = (dict.fromkeys(NAMES, "cpu") | {"processor": processor} for processor in ("one", "other"))
    merge(machine_in(results, one, "day 2"), "mlp", {"time": {"ours": figures(2.0)}})
    merge(machine_in(results, other, "day 2"), "mlp", {"time": {"ours": figures(3.0)}})
    merge(machine_in(results, dict(one), "day 2"), "mlp", {"memory": {"ours": memory}})
    merge(machine_in(results, dict(one), "day 1"), "mlp", {"time": {"ours": figures(1.0)}})
    assert [machine["environment"] for machine in results["machines"]] == [one, other]
    page = step_page(results)
    first, second = page.index("### one"), page.index("### other")
    assert "| 1.00 ✓ [≤ 1.4] |" in page[first:second]
    assert "Measured on cpu (one), day 1 and day 2: python cpu" in page[first:second]
    assert "Measured on cpu (other), day 2: python cpu" in page[second:]
    assert "| 3.00 ✗ [≤ 1.4] |" in page[second:]


def test_least_cost_takes_the_cheaper_way_in_each_layer() -> None:
    cost = Cost(parameters=10, layers=[LayerCost(600, 0, 100), LayerCost(200, 0, 100), LayerCost(50, 0, 0)])
    rates = {"mult_per_ms": 10.0, "bytes_per_ms": 4.0}
    # kept, written and read: 2 * 100 / 4; products: 200 / 10 and 50 / 10; the mean is added to the noise: 40 / 4
    assert cost.least_ms(1.0, 2.0, rates) == 1.0 + 2.0 + 50.0 + 20.0 + 5.0 + 10.0


def test_rates_are_those_of_a_product_and_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_machine, "_least_ms", lambda work: (work(), 2.0)[1])
    assert measure_rates() == {"mult_per_ms": 1024**3 / 2.0, "bytes_per_ms": 2**26 / 2.0}


def test_draws_are_measured_for_all_trained_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(GaussianNoise, "fill_", lambda self, sums, std: seen.append((sums.numel(), std)))
    taken = measure_noise(CASES["lora"])
    assert 0 < taken["least_ms"] <= taken["ms"]
    assert set(seen) == {(cost_of(CASES["lora"]).parameters, 1.0)}


def test_new_figures_replace_those_of_the_same_mode_only() -> None:
    machine: dict[str, Any] = {"cases": {}}
    merge(machine, "mlp", {"time": {"ours": figures(2.0)}})
    merge(machine, "mlp", {"failed": {"ew": "why"}})
    merge(machine, "mlp", {"time": {"ew": figures(3.0)}, "memory": {"ours": {"ratio": 1.0}}})
    merge(machine, "mlp", {"time": {"ours": figures(1.5)}})
    held = machine["cases"]["mlp"]
    assert (held["time"]["ours"]["median"], held["time"]["ew"]["median"]) == (1.5, 3.0)
    assert held["memory"] == {"ours": {"ratio": 1.0}}
    assert held["failed"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU they run")
def test_cases_for_a_gpu_are_left_out_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [name for name, case in CASES.items() if case.needs_gpu] == ["vit", "bert"]
    threads = torch.get_num_threads()
    command = ["step_cost.py", "--cases", "vit", "bert", "--out", str(tmp_path / "out.json"), "--threads", str(threads)]
    monkeypatch.setattr("sys.argv", command)
    main()
    assert capsys.readouterr().out == "vit: left out, it needs a GPU\nbert: left out, it needs a GPU\n"


@pytest.mark.slow
def test_process_says_when_steps_began_and_why_a_mode_fails() -> None:
    served = (
        "from benchmarks.step_processes import serve\n"
        "began = lambda case, mode, steps, warmup: [float(steps), float(warmup), 1 / (mode != 'bad')]\n"
        "print('noise of a library'); serve(began)"
    )
    with OwnProcesses([sys.executable, "-c", served], tuple) as runner:
        assert runner(CASES["mlp"], "plain", 5, 2) == (5.0, 2.0, 1.0)
        first = runner._processes["plain"].pid
        assert runner(CASES["mlp"], "plain", 6, 3) == (6.0, 3.0, 1.0)
        assert runner._processes["plain"].pid == first
        with pytest.raises(DoesNotRun, match=r"ZeroDivisionError: division by zero"):
            runner(CASES["mlp"], "bad", 5, 2)
        processes = list(runner._processes.values())
        assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)
    ended = [sys.executable, "-c", "input(); raise SystemExit(3)"]
    with OwnProcesses(ended, tuple) as runner, pytest.raises(DoesNotRun, match="status 3"):
        runner(CASES["mlp"], "plain", 5, 2)


def test_counts_of_a_linear_layer_with_and_without_positions() -> None:
    one = Case("one", 4, lambda: nn.Linear(3, 5), lambda size: torch.randn(size, 3), 5, 1.0, 1.0)
    cost = cost_of(one)
    assert (cost.parameters, cost.native, cost.kept_bytes) == (20, 4 * 3 * 15, 0)
    assert (cost.norms, cost.masked) == (4 * 8, 4 * 15)
    cost = cost_of(Case("two", 4, lambda: nn.Linear(3, 5), lambda size: torch.randn(size, 2, 3), 5, 1.0, 1.0))
    assert (cost.native, cost.kept_bytes) == (4 * 2 * 3 * 15, 4 * 4 * 15)
    assert (cost.norms, cost.masked) == (4 * 3 * 8, 4 * 2 * 15)


def test_counts_of_a_convolution_take_the_cheaper_gram_matrix() -> None:
    def cost(kernel: int, channels: int, size: int) -> Cost:
        return cost_of(
            Case(
                "conv",
                2,
                lambda: nn.Conv2d(channels, 7, kernel),
                lambda n: torch.randn(n, channels, size, size),
                7,
                1,
                1,
            )
        )

    channels_only = cost(3, 50, 5)  # 25 positions in, 9 out, patches of 450
    assert channels_only.norms == 2 * (325 * 50 + 45 * 7)
    assert channels_only.masked == 2 * 9 * 450 * 7
    assert channels_only.kept_bytes == 4 * 2 * 450 * 7
    patches = cost(4, 50, 5)  # 4 out, patches of 800: less than 25 positions in of 50 channels
    assert patches.norms == 2 * (10 * 800 + 10 * 7)
