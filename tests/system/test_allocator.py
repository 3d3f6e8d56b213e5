"""glibc's thresholds where there is no glibc; what they do where there is one is in ``test_tuning.py``."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator

import pytest

from lightning_dp.system import allocator


@pytest.fixture
def library_is_asked_for_again() -> Iterator[None]:
    """It is asked for once per process."""
    allocator._glibc.cache_clear()
    yield
    allocator._glibc.cache_clear()


@pytest.mark.usefixtures("library_is_asked_for_again")
@pytest.mark.parametrize("lacks", ["system", "glibc"])
def test_another_c_library_is_left_alone(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: pytest.fail("a library was asked for"))
    assert not allocator.keep_freed_memory()
    allocator.follow_default_thresholds()
    allocator.give_back_freed_memory()


def test_a_refusal_of_glibc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mallopt(self, parameter: int, value: int) -> int:
            return 0

    monkeypatch.setattr(allocator, "_glibc", Refusing)
    monkeypatch.setattr(allocator, "_is_set_by_user", lambda: False)
    assert not allocator.keep_freed_memory()
