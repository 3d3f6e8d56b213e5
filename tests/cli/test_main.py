"""The command itself: help and version cost little, and what it offers is what the package has."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_dp
from lightning_dp import accounting
from lightning_dp.cli import main

HELP = """
import sys
from lightning_dp.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*{name.partition(".")[0] for name in sys.modules})
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["calibrate", "--help"], ["card"]], ids=" ".join)
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if arguments == ["card"] else 0)
    names = set(done.stdout.splitlines()[-1].split())
    assert "lightning_dp" in names
    assert not names & {"torch", "numpy", "scipy", "dp_accounting", "opacus", "torchmetrics", "lightning"}


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-dp {lightning_dp.__version__}\n"


def test_choices_are_those_of_the_package() -> None:
    module = sys.modules[main.__module__]
    assert tuple(accounting.ACCOUNTANTS) == module.ACCOUNTANTS
    assert accounting.NEIGHBORING_RELATIONS == module.RELATIONS
