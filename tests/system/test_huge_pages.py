"""Huge pages: which part of a buffer is asked for, and that no value depends on it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest
import torch

from lightning_dp.system import ProcessTuning
from lightning_dp.system.huge_pages import huge_pages

PAGE = 2**21
linux = pytest.mark.skipif(sys.platform != "linux", reason="madvise of Linux")


class Library:
    """Notes what is asked of the kernel."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def madvise(self, begin: Any, length: Any, advice: int) -> None:
        self.asked.append((begin.value, length.value, advice))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: found)
    return found


@pytest.mark.parametrize("size", [0, 3, 2**19 - 1, 2**20, 3 * 2**20 + 7])
def test_huge_pages_change_no_value(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    assert huge_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size, dtype=torch.float32))


@linux
def test_whole_pages_within_the_buffer_are_asked_for(library: Library) -> None:
    tensor = torch.empty(5 * PAGE, dtype=torch.uint8)
    huge_pages(tensor)
    ((begin, length, advice),) = library.asked
    end = tensor.data_ptr() + tensor.nbytes
    assert begin % PAGE == length % PAGE == 0
    assert 0 <= begin - tensor.data_ptr() < PAGE
    assert 0 <= end - begin - length < PAGE
    assert advice == 14


@linux
def test_nothing_is_asked_for_while_tuning_is_off(library: Library) -> None:
    with ProcessTuning(enabled=False):
        huge_pages(torch.empty(5 * PAGE, dtype=torch.uint8))
    huge_pages(torch.empty(5 * PAGE, dtype=torch.uint8, device="meta"))
    assert not library.asked
