"""``lightning-dp check``: every layer, what must change, what ``fix`` would do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_dp.cli import main, output
from lightning_dp.per_sample.inspect import inspect
from tests.cli.modules_to_check import Mixed
from tests.processes import run_script

FILE = str(Path(__file__).with_name("modules_to_check.py"))


def layers(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    assert main(["check", *arguments, "--json"]) == code
    return {layer.pop("name"): layer for layer in json.loads(capsys.readouterr().out)["layers"]}


def test_what_can_be_private_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    found = layers(capsys, f"{FILE}:Private")
    assert {name: layer["handling"] for name, layer in found.items()} == {
        "": "by the operations that use it: a rule, or one copy a sample",
        "first": "norms from one backward; weights shared with second",
        "act": "by the operations that use it: a rule, or one copy a sample",
        "second": "norms from one backward; weights shared with first",
        "frozen": "frozen",
    }
    assert not any(layer["problem"] or layer["fix"] for layer in found.values())
    assert found["first"]["num_trainable"] == 16
    assert layers(capsys, f"{FILE}:Private", "--init", '{"hidden": 5}')["first"]["num_trainable"] == 20
    assert layers(capsys, "tests.cli.modules_to_check:made")["first"]["num_trainable"] == 28


def test_what_must_change_says_what_fix_does(capsys: pytest.CaptureFixture[str]) -> None:
    found = layers(capsys, f"{FILE}:Mixed", code=1)
    assert list(found) == ["block.0", "block.1", "rnn", "attention", "attention.out_proj"]
    assert "statistics of the batch" in found["block.1"]["problem"]
    assert found["block.1"]["fix"].startswith("BatchNorm2d became GroupNorm with 16 groups of 2 channels")
    assert found["rnn"]["problem"] == found["rnn"]["fix"] == ""
    assert found["rnn"]["handling"] == "norms from one backward"
    assert found["attention"]["problem"] == found["attention"]["fix"] == ""
    assert found["attention.out_proj"]["handling"] == "norms from one backward"


def test_inspection_changes_nothing() -> None:
    module = Mixed()
    before = [(name, type(layer)) for name, layer in module.named_modules()]
    inspect(module)
    assert [(name, type(layer)) for name, layer in module.named_modules()] == before


def test_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["check", f"{FILE}:Mixed"]) == 1
    text = capsys.readouterr().out
    table, _, verdict = text.rstrip().rpartition("\n\n")
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "MUST CHANGE:" in table
    assert verdict == "1 of 5 layers must change; `module, changes = lightning_dp.fix(module)` does it for 1."
    assert main(["check", f"{FILE}:Private"]) == 0
    assert "The independence check at the first batch of a run sees them." in capsys.readouterr().out


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables_with_and_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, with_rich: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    output.write_table(("layer", "note"), [("a[bold].b", "five words that wrap here, of course")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].split() == ["layer", "note"]
    assert lines[1].startswith("a[bold].b  five words")
    assert " ".join(line[11:] for line in lines[1:]) == "five words that wrap here, of course"
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (f"{FILE}:Nothing", "Expected a module named 'Nothing' in .*Its modules are: Private, Mixed, Broken"),
        (f"{FILE}:number", "Expected number to be or to make a torch.nn.Module, got int"),
        (f"{FILE}:Broken", r"Expected Broken\(\*\*{}\) to work, got TypeError: .*--init"),
        ("nowhere.py:Net", "Expected a Python file, got 'nowhere.py', which does not exist"),
        ("no.such.package:Net", "Expected no.such.package to import, got ModuleNotFoundError"),
        (FILE, "Expected FILE.py:NAME or package.module:NAME"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], target: str, message: str) -> None:
    assert main(["check", target]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    with pytest.raises(AssertionError, match=f"lightning-dp check: error: {message}"):
        raise AssertionError(captured.err)


def test_arguments_of_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    for init in ("{", "[1]"):
        assert main(["check", f"{FILE}:Private", "--init", init]) == 2
        assert "Expected --init to be a JSON object" in capsys.readouterr().err


def test_command_as_a_process(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        """
import runpy, sys, warnings
warnings.simplefilter("error")
for name in [name for name in sys.modules if name.startswith("lightning_dp.cli")]:
    del sys.modules[name]
try:
    runpy.run_module("lightning_dp.cli", run_name="__main__")
except SystemExit as end:
    print("ended with", end.code)
"""
    )
    assert run_script(script, "check", f"{FILE}:Gone", folder=tmp_path) == "ended with 2\n"
    said = (tmp_path / "command0.err").read_text()
    assert said.startswith("lightning-dp check: error: Expected a module named 'Gone'")
