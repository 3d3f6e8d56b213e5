"""The threads that wait for torch's next computation: they end on request, and no result depends on it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_dp.system import openmp as waiting_threads
from lightning_dp.system.openmp import can_end_waiting_threads, end_waiting_threads

TASKS = Path("/proc/self/task")


def compute() -> torch.Tensor:
    """Large enough that torch works on it with all its threads."""
    return torch.arange(2.0**20).square().sum()


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, which wait after a computation."""
    for name in waiting_threads._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    if waiting_threads._pause() is None:
        pytest.skip("torch does not compute with GNU's OpenMP")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    end_waiting_threads()
    torch.set_num_threads(before)


@pytest.mark.usefixtures("pause")
def test_threads_end_and_the_next_computation_starts_new() -> None:
    before = compute()
    working = len(list(TASKS.iterdir()))
    assert end_waiting_threads()
    left = len(list(TASKS.iterdir()))
    assert left == working - (torch.get_num_threads() - 1)
    assert end_waiting_threads()  # there may be none
    assert torch.equal(compute(), before)
    assert len(list(TASKS.iterdir())) == working


@pytest.mark.usefixtures("pause")
def test_a_forked_child_ends_no_threads() -> None:
    compute()
    child = os.fork()
    if child == 0:
        os._exit(17 if end_waiting_threads() is False else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17


@pytest.mark.usefixtures("pause")
@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_the_user_lets_threads_wait_takes_precedence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    compute()
    working = len(list(TASKS.iterdir()))
    assert not can_end_waiting_threads()
    assert end_waiting_threads() is False
    assert len(list(TASKS.iterdir())) == working


@pytest.mark.parametrize("lacks", ["system", "library", "call"])
def test_without_the_call_nothing_is_done(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_threads._pause.cache_clear()
    if lacks == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: pytest.fail("a library was asked for"))
    elif lacks == "library":

        def load(*args: object, **kwargs: object) -> None:
            raise OSError("not loaded")

        monkeypatch.setattr(ctypes, "CDLL", load)
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    try:
        assert end_waiting_threads() is False
    finally:
        waiting_threads._pause.cache_clear()


def test_a_refusal_of_the_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_threads, "_pause", lambda: lambda: False)
    assert end_waiting_threads() is False
