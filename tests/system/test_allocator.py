"""What the process asks of the system's memory: seen from the page faults it has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from lightning_dp.system import allocator

ON_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

FAULTS = """
import ctypes, resource, sys, torch
from lightning_dp.system.allocator import give_back_freed_memory, keep_freed_memory
# the threshold for mapping where glibc begins, and fixed: where glibc moves it, what lies at the heap's end decides by chance
assert ctypes.CDLL(None).mallopt(-3, 2**17)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**18) for _ in range(200)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "keep":
    give_back_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**18) for _ in range(200)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> list[int]:
    environment = {name: value for name, value in os.environ.items() if name not in allocator._ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True, env=environment
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(not ON_GLIBC, reason="glibc's thresholds")
def test_what_is_freed_is_used_again_and_given_back_when_asked() -> None:
    """200 blocks of 1 MiB are 51,200 pages."""
    assert page_faults("default")[0] > 10_000
    again, after_giving_back = page_faults("keep")
    assert again < 1_000
    assert after_giving_back > 10_000


@pytest.mark.parametrize("name", allocator._ENVIRONMENT)
def test_the_users_own_thresholds_stand(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory()
    allocator.give_back_freed_memory()


@pytest.mark.parametrize("size", [0, 3, 2**19 - 1, 2**20, 3 * 2**20 + 7])
def test_large_pages_change_no_value(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32)
    assert allocator.large_pages(tensor) is tensor
    assert torch.equal(tensor, torch.arange(size, dtype=torch.float32))
