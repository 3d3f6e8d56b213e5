"""A test of something optional is skipped, with the reason, if its package is missing; every other missing module
fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import OPTIONAL, reason_to_skip
from tests.processes import run_script

CASES = """
def test_optional():
    {line}

def test_own_mistake():
    import lightning_dp.no_such_module
"""


def test_optional_modules_are_those_of_the_extras() -> None:
    assert {"transformers", "sklearn", "matplotlib", "rich", "wandb", "mkl_random", "pytorch_optimizer"} <= OPTIONAL
    assert not OPTIONAL & {"pytest", "hypothesis", "torch", "lightning", "lightning-dp", "sphinx"}


@pytest.mark.parametrize("within", ["a test", "a file"])
def test_missing_optional_package_skips(within: str, tmp_path: Path) -> None:
    """A stand-in for an optional package raises as Python does where the package is missing."""
    line = "raise ModuleNotFoundError('No module named wandb', name='wandb')"
    text = CASES.format(line=line) if within == "a test" else line
    (tmp_path / "test_some.py").write_text(text)
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_make_collect_report, pytest_runtest_call\n"
    )
    script = tmp_path / "run.py"
    script.write_text("import sys, pytest\npytest.main(sys.argv[1:])\n")
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null", "--rootdir", tmp_path]
    said = run_script(script, *options, tmp_path / "test_some.py", folder=tmp_path)
    assert "needs the package wandb, which the extra test-all installs" in said
    assert ("1 failed, 1 skipped" if within == "a test" else "1 skipped") in said


def test_only_missing_optional_modules_are_a_reason_to_skip() -> None:
    assert reason_to_skip(ModuleNotFoundError("No module named x", name="x")) is None
    assert reason_to_skip(ImportError("cannot import name y", name="wandb")) is None
    assert reason_to_skip(None) is None
    assert "wandb" in (reason_to_skip(ModuleNotFoundError("Try `pip install wandb`.")) or "")
