"""Tuning of the process: what malloc does before, while and after, and that nothing of a fit outlives it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from lightning_dp.datalens import DataLens, MLPDiscriminator, MLPGenerator, StepsOver
from lightning_dp.noise import cpu
from lightning_dp.system import ProcessTuning, allocator, openmp, tuning
from tests.helpers import make_trainer

ON_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
glibc = pytest.mark.skipif(not ON_GLIBC, reason="thresholds of glibc")

#: What a process does in which nothing was freed; in which a block of nearly 32 MiB was; and while memory is kept.
FRESH = {"maps 1 MiB": True, "maps 31 MiB": True, "maps 33 MiB": True, "keeps 40 MiB": True, "keeps 200 MiB": False}
ADJUSTED = {**FRESH, "maps 1 MiB": False, "maps 31 MiB": False}
KEPT = {**ADJUSTED, "keeps 200 MiB": True}


def ask(steps: str, **environment: str) -> list[Any]:
    """Run the steps of ``probe.py`` in a process whose environment sets nothing else of malloc's and OpenMP's."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "OMP_", "GOMP_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.probe", *steps.split()],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | environment,
        cwd=Path(__file__).parents[2],
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@glibc
def test_stop_leaves_what_glibcs_own_rule_reaches() -> None:
    """Its upper limits: a process that nobody tuned has them once it has freed a block of nearly 32 MiB."""
    assert ask("state") == [FRESH]
    assert ask("state-large") == [ADJUSTED]
    assert ask("start state stop state") == [KEPT, ADJUSTED]


@glibc
def test_stop_returns_freed_memory() -> None:
    """``state`` frees 200 MiB in all, which stay in the process until the tuning stops."""
    before, kept, after = (
        each for each in ask("resident start state resident stop resident") if isinstance(each, float)
    )
    assert kept > before + 150
    assert after < before + 8


@glibc
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("start start stop state", ADJUSTED),
        ("stop state", FRESH),
        ("start stop stop state", ADJUSTED),
        ("start start-2 stop state", KEPT),
        ("start start-2 stop-2 state", KEPT),
        ("start start-2 stop-2 stop state", ADJUSTED),
        ("start stop start state", KEPT),
    ],
)
@pytest.mark.one_in(2)
def test_starts_and_stops_of_two_fits(steps: str, expected: dict[str, bool]) -> None:
    assert ask(steps) == [expected]


@glibc
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("start fork state", [ADJUSTED]),
        ("start fork stop state", [ADJUSTED]),
        ("start fork start-2 state stop-2 state", [KEPT, ADJUSTED]),
        ("fork state", [FRESH]),
    ],
)
@pytest.mark.one_in(2)
def test_a_forked_child_begins_without_tuning(steps: str, expected: list[dict[str, bool]]) -> None:
    assert ask(steps) == expected


@glibc
@pytest.mark.parametrize(
    "setting",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"MALLOC_TOP_PAD_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
    ids=str,
)
@pytest.mark.one_in(4)
def test_settings_in_the_environment_take_precedence(setting: dict[str, str]) -> None:
    untouched, says, stopped = ask("state start describe stop state", **setting)
    assert ask("start state", **setting) == [untouched]
    assert stopped == untouched
    assert "glibc" not in says


@glibc
def test_other_tunables_of_glibc_do_not_matter() -> None:
    assert ask("start state", GLIBC_TUNABLES="glibc.rtld.nns=5") == [KEPT]


@glibc
def test_switched_off_it_changes_nothing() -> None:
    says, state = ask("start describe state stop --off")
    assert says == "Process tuning is off (tune_process=False)."
    assert state == FRESH


@glibc
def test_what_is_tuned_is_described() -> None:
    before, within, after = ask("describe start describe stop describe")
    assert before == after == "Process tuning changes nothing here."
    assert (
        within == "Process tuning until the end of fit: glibc keeps freed memory. Switch it off by tune_process=False."
    )


def test_threads_of_openmp_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_pause", lambda: lambda: True)
    monkeypatch.setattr(openmp, "_forked", False)
    for name in openmp._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with ProcessTuning() as running:
        assert "OpenMP threads that wait are ended" in running.describe()
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        assert "OpenMP" not in running.describe()


def test_elsewhere_than_on_the_cpu_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: pytest.fail("thresholds were set"))
    running = ProcessTuning()
    running.start(on_cpu=False)
    running.stop()
    off = ProcessTuning(enabled=False)
    off.start()
    off.stop()


def test_an_exception_within_ends_it() -> None:
    def fit() -> None:
        with ProcessTuning():
            seen.extend(tuning._running)
            raise KeyError("of the fit")

    seen: list[ProcessTuning] = []
    with pytest.raises(KeyError, match="of the fit"):
        fit()
    assert len(seen) == 1
    assert not tuning._running


class Net(L.LightningModule):
    """A layer large enough for noise on several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(400, 400)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Watch(L.Callback):
    """What is true at the end of a batch, before the fit is stopped or raises."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen = {"running": len(tuning._running), "keeps": allocator._keeps, "threads": set(threading.enumerate())}
        if self.raises:
            raise KeyError("of the fit")


def private_fit(callback: L.Callback, folder: Path) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), folder, callbacks=[callback])
    trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(32, 400)), batch_size=8))


def datalens_fit(callback: L.Callback, folder: Path) -> None:
    size = 3000  # times 30 samples of a batch: more than a stream draws at a time
    lens = DataLens(MLPGenerator(4, size), MLPDiscriminator(size), num_teachers=4, top_k=5, sigma=1.0, z_dim=4)
    make_trainer("auto", folder, callbacks=[callback]).fit(lens, StepsOver(TensorDataset(torch.rand(40, size)), 2))


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("fit", [private_fit, datalens_fit])
@pytest.mark.one_in(2)
def test_no_thread_and_no_setting_outlives_a_fit(
    fit: Callable[[L.Callback, Path], None], raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu, "_LEAST_PER_WAITING_THREAD", 1)
    monkeypatch.setattr(cpu, "end_waiting_threads", lambda: True)
    before, callback = set(threading.enumerate()), Watch(raises)
    if raises:
        with pytest.raises(KeyError, match="of the fit"):
            fit(callback, tmp_path)
    else:
        fit(callback, tmp_path)
    assert callback.seen["running"] == 1
    assert callback.seen["keeps"] == ON_GLIBC
    assert any(thread.name.startswith("noise") for thread in callback.seen["threads"] - before)
    assert not {
        thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("noise", "normals"))
    }
    assert not tuning._running
    assert not allocator._keeps
