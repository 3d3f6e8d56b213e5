"""The utility benchmarks run end to end at their smallest, and what they say is made from what they measured."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks import pruning, pruning_report, sparsification, sparsification_report, utility, utility_report
from benchmarks.readme import README, write_section
from benchmarks.stats import chance_of_false_call, difference, mean_of
from benchmarks.tasks import TASKS

SECTIONS = ("utility", "sparsification", "pruning")
REPORTS: dict[str, Any] = {
    "utility": utility_report,
    "sparsification": sparsification_report,
    "pruning": pruning_report,
}


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """Restore log levels and threads, which benchmarks change, for the next test."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    before, threads = {name: logging.getLogger(name).level for name in names}, torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    """Return a page with empty sections."""
    page = tmp_path / "README.md"
    page.write_text("# Title\n\n" + "\n".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in SECTIONS))
    return page


def test_write_section_replaces_its_section_only(readme: Path) -> None:
    write_section("pruning", "old", readme=readme)
    write_section("utility", "  first  \n", readme=readme)
    once = readme.read_text()
    write_section("utility", "first", readme=readme)
    assert readme.read_text() == once
    assert "<!-- utility -->\nfirst\n<!-- /utility -->\n" in once
    assert "<!-- pruning -->\nold\n<!-- /pruning -->\n" in once
    write_section("pruning", "new", readme=readme)
    assert readme.read_text() == once.replace("old", "new")


def test_write_section_refuses_missing_or_repeated_sections(readme: Path) -> None:
    with pytest.raises(ValueError, match=r"one section 'other' in README.md"):
        write_section("other", "text", readme=readme)
    readme.write_text(readme.read_text() * 2)
    with pytest.raises(ValueError, match=r"one section 'utility' in README.md"):
        write_section("utility", "text", readme=readme)


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_in_the_repository_is_what_the_results_give(name: str) -> None:
    """Compare every section with the text that its results give: none is edited by hand or left old."""
    text = REPORTS[name].section(json.loads(README.with_name(f"{name}.json").read_text())).strip()
    assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in README.read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            assert README.with_name(line.rpartition("(")[2].rstrip(")")).exists(), line


def test_a_difference_is_paired_and_needs_two_standard_errors() -> None:
    base = {"0": 0.5, "1": 0.7, "2": 0.9}  # spread wider than the difference: pairing must take it out
    other = {seed: value + 0.01 * (1 + int(seed)) for seed, value in base.items()}
    assert difference(other, base).verdict == "higher"
    assert difference(base, other).verdict == "lower"
    assert difference({"0": 0.51, "1": 0.69, "2": 0.9}, base).verdict == "within noise"
    assert difference(base, base).verdict == "within noise"
    found = difference(other, base).mean
    assert (found.value, found.error) == pytest.approx((0.02, 0.01 / math.sqrt(3)))
    with pytest.raises(ValueError, match=r"two seeds or more"):
        difference(base, {"2": 0.1, "3": 0.2})


def test_chance_of_a_false_call_is_that_of_students_t() -> None:
    assert chance_of_false_call(2) == pytest.approx(1 - 2 / math.pi * math.atan(2))  # Cauchy
    assert chance_of_false_call(100_000) == pytest.approx(math.erfc(math.sqrt(2)), rel=1e-3)  # normal


@pytest.mark.parametrize("name", list(TASKS))
def test_no_record_is_in_two_splits_of_a_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mnist1d":
        pytest.importorskip("mnist1d")
    monkeypatch.chdir(tmp_path)
    task = TASKS[name]

    def records(dataset: Any) -> list[tuple[float, ...]]:
        return [tuple(record.flatten().tolist()) for record in dataset.tensors[0]]

    trained, judged = records(task.for_report.train), records(task.for_report.held_out)
    tried, decided = records(task.for_choice.train), records(task.for_choice.held_out)
    assert len(judged) == task.test_size
    assert len(decided) == task.validation_size
    assert not set(judged) & set(trained)
    assert not set(decided) & set(tried)
    assert sorted(tried + decided) == sorted(trained)
    assert not list(tmp_path.iterdir()), "a data set was written or downloaded"


def test_utility_from_runs_to_page_and_on_from_there(
    tmp_path: Path, readme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "utility.json"
    arguments = ["--smoke", "--workers", "0", "--out", str(out), "--readme", str(readme)]
    utility.main(arguments)
    results = json.loads(out.read_text())
    assert set(results) == {"digits"}
    private, plain = results["digits"]["3"], results["digits"]["none"]
    assert set(private) | set(plain) == set(utility.SMOKE_METHODS)
    for place in (*private.values(), *plain.values()):
        assert place["choice"].keys() == {"1"}
        assert place["choice"]["1"].keys() == {"100", "101"}
        assert place["report"].keys() == {"0", "1"}
        assert all(0 < figure <= 1 for figure in place["report"].values())
    assert all(2.97 <= place["epsilon"] <= 3 for place in private.values())
    assert out.with_suffix(".png").stat().st_size > 5000

    flat = list(private["flat"]["report"].values())
    cell = f"| flat | {statistics.mean(flat):.3f} ± {abs(flat[0] - flat[1]) / 2:.3f} | 1 |"
    assert cell in readme.read_text()

    monkeypatch.setattr(utility, "execute", lambda run: pytest.fail(f"ran again: {run}"))
    before = out.read_text()
    utility.main(arguments)
    assert out.read_text() == before
    private["flat"]["report"] = {"0": 0.25, "1": 0.75}
    out.write_text(json.dumps(results))
    utility.main([*arguments, "--report"])
    assert "| flat | 0.500 ± 0.250 | 1 |" in readme.read_text()
    assert cell not in readme.read_text()


def utility_results(**shifts: float) -> dict[str, Any]:
    """Return results of four seeds: each method above flat clipping by its shift, slightly varied by seed."""
    jitter = (0.001, -0.001, 0.002, -0.002)
    cell = {
        method: {
            "choice": {"0.5": {"100": 0.1}, "1": {"100": 0.5}, "2": {"100": 0.4}},
            "lr": 1.0,
            "epsilon": 0.995,
            "report": {str(i): 0.8 + 0.05 * i + shift + (shift != 0) * jitter[i] for i in range(4)},
        }
        for method, shift in shifts.items()
    }
    return {"digits": {"1": cell}}


def test_utility_sentences_follow_the_figures() -> None:
    shifts = {"flat": 0.0, "AUTO-S": 0.03, "AUTO-V": -0.03, "PSAC": 1e-4, "pruning .5": 0.02, "random mask .5": 0.03}
    text = utility_report.section(utility_results(**shifts))
    assert "digits, epsilon 1: helps: AUTO-S, pruning .5, random mask .5. Costs: AUTO-V. Within noise: PSAC." in text
    assert "pruning .5 against its control, random mask .5: higher on none; lower on digits at 1" in text
    assert "4 seeds" in text
    turned = utility_report.section(utility_results(**{name: -shift for name, shift in shifts.items()}))
    assert "helps: AUTO-V. Costs: AUTO-S, pruning .5, random mask .5. Within noise: PSAC." in turned
    assert "lower on none" in turned


def test_utility_drops_reports_whose_rate_is_no_longer_the_best() -> None:
    results, units = utility_results(flat=0.0), [(1.0, "flat")]
    options = utility.argparse.Namespace(seeds=4, epochs=None)
    assert utility.missing_reports(results, "digits", units, options) == []
    results["digits"]["1"]["flat"]["choice"]["4"] = {"100": 0.9}
    runs = utility.missing_reports(results, "digits", units, options)
    assert {run.lr for run in runs} == {4.0}
    assert [run.seed for run in runs] == [0, 1, 2, 3]


def test_inversion_from_runs_to_page(tmp_path: Path, readme: Path) -> None:
    out = tmp_path / "sparsification.json"
    sparsification.main(["--smoke", "--studies", "inversion", "--out", str(out), "--readme", str(readme)])
    attacked = json.loads(out.read_text())["inversion"]["settings"]
    assert attacked.keys() == {"0 none", "0 10", "0.9 none", "0.9 10"}
    assert all(len(item["mse"]) == len(item["identified"]) == 2 for item in attacked.values())
    assert statistics.mean(attacked["0 none"]["mse"]) < statistics.mean(attacked["0 10"]["mse"])
    assert f"| 10 | {mean_of(attacked['0 10']['mse']).text(4)} |" in readme.read_text()
    for picture in ("inversion.png", "inversion_images.png"):
        assert (tmp_path / picture).stat().st_size > 5000


@pytest.mark.slow
def test_bytes_from_runs_to_page(tmp_path: Path, readme: Path) -> None:
    out = tmp_path / "sparsification.json"
    sparsification.main(["--smoke", "--studies", "bytes", "--out", str(out), "--readme", str(readme)])
    counted = json.loads(out.read_text())["bytes"]
    dense = 4 * counted["parameters"]
    assert [step["bytes"] for step in counted["dense"]] == [dense]
    assert [step["bytes"] for step in counted["sparsified"]] == [dense, dense - 4 * int(0.9 * counted["parameters"])]
    assert [step["logged"] for step in counted["sparsified"]] == [step["bytes"] for step in counted["sparsified"]]
    assert f"A dense step sends {dense} bytes per rank" in readme.read_text()
    assert (tmp_path / "sparsification.png").stat().st_size > 5000


def test_sparsification_sentences_follow_the_figures() -> None:
    low, high = [0.010, 0.012, 0.011], [0.050, 0.053, 0.049]
    step = {"masked": 0.5, "bytes": 50.0, "logged": 49.0}
    results: dict[str, Any] = {
        "bytes": {"parameters": 25, "backend": "gloo", "dense": [{**step, "bytes": 100.0}], "sparsified": [step]},
        "inversion": {"images": 3, "seeds": 1, "guess": {"mse": [0.05, 0.05, 0.05]}, "settings": {}},
    }
    for key, mse in (("0 none", low), ("0 1", high), ("0.9 none", high), ("0.9 1", high)):
        results["inversion"]["settings"][key] = {"mse": mse, "identified": [1.0, 0.0, 1.0]}
    text = sparsification_report.section(results)
    assert "at most 0.00 % of dense, and equals the logged figure in 0 of 1 masks" in text
    assert "the attack works (dense 0.0110" in text
    assert "error higher at: no noise; lower at: none; within noise at: epsilon 1." in text
    assert "not below that of guessing, at: epsilon 1. The same holds sparsified at: no noise, epsilon 1." in text


@pytest.mark.slow
def test_pruning_from_runs_to_page(tmp_path: Path, readme: Path) -> None:
    out = tmp_path / "pruning.json"
    pruning.main(["--smoke", "--out", str(out), "--readme", str(readme)])
    results = json.loads(out.read_text())
    assert results.keys() == pruning.STUDIES.keys()
    assert set(map(len, results["stages"]["arms"]["SGD"].values())) == {pruning.SMOKE.epochs}
    names = [f"{arm}, bound {bound:g}" for bound in pruning.BOUNDS for arm in ("clip only", "noise only", "both")]
    assert list(results["parts"]) == ["neither", *names]
    assert [int(width) for width in results["dimensions"]] == list(pruning.SMOKE.widths)
    assert results["masks"].keys() == {"width", "dense", *pruning.MASKS}
    page = readme.read_text()
    assert f"| neither | 1 | {mean_of(results['parts']['neither']['report'].values())} |" in page
    for name in results:
        assert (tmp_path / f"pruning_{name}.png").stat().st_size > 5000

    results["parts"]["neither"]["report"] = {"0": 0.25, "1": 0.75}
    out.write_text(json.dumps(results))
    pruning.main(["--report", "--out", str(out), "--readme", str(readme)])
    assert "| neither | 1 | 0.500 ± 0.250 |" in readme.read_text()


def test_a_claim_holds_only_if_the_figures_say_so() -> None:
    base = {str(seed): 0.5 + 0.1 * seed for seed in range(4)}
    above, below = ({seed: value + shift for seed, value in base.items()} for shift in (0.1, -0.1))
    yes, no, open_ = (pruning_report.Part("it", difference(arm, base)) for arm in (above, below, base))
    assert pruning_report.verdict([yes, yes]) == "**Holds here.**"
    assert pruning_report.verdict([yes, no]) == "**Does not hold here.**"
    assert pruning_report.verdict([yes, open_]).startswith("**Not shown here**")
    assert pruning_report.verdict([no, yes], any_suffices=True) == "**Holds here.**"
    assert pruning_report.verdict([no, no], any_suffices=True) == "**Does not hold here.**"
    assert pruning_report.verdict([no, open_], any_suffices=True).startswith("**Not shown here**")

    def parts(**arms: dict[str, float]) -> dict[str, Any]:
        names = {
            "neither": "neither",
            "clip": "clip only, bound 1",
            "noise": "noise only, bound 1",
            "both": "both, bound 1",
        }
        return {names[arm]: {"lr": 1.0, "choice": {}, "report": report} for arm, report in arms.items()}

    worst = {seed: value - 0.2 for seed, value in base.items()}
    assert "**Holds here.**" in pruning_report.parts_text(parts(neither=above, clip=below, noise=base, both=worst))
    assert "**Does not hold" in pruning_report.parts_text(parts(neither=above, clip=base, noise=below, both=worst))
