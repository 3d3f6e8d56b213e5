"""What malloc does in a process of its own, asked step by step: ``python -m tests.system.probe STEP ...`` prints one
line per step.

A step begins or stops a tuning (``start``, ``start-2``, ``stop``, ``stop-2``), or asks: ``state``, ``describe``.
``fork`` runs the steps after it in a child. Nothing here imports torch, so that few blocks were freed before.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

from lightning_dp.system import ProcessTuning

MIB = 2**20
LIBRARY = ctypes.CDLL(None)
LIBRARY.malloc.restype = ctypes.c_void_p


def is_mapped(size: int) -> bool:
    """Whether glibc maps a block of its own for so many bytes: bit 1 of the size that it writes before the block."""
    LIBRARY.malloc_trim(ctypes.c_size_t(0))  # else what was freed before may be large enough
    address = LIBRARY.malloc(ctypes.c_size_t(size))
    mapped = bool(ctypes.c_size_t.from_address(address - 8).value & 2)
    LIBRARY.free(ctypes.c_void_p(address))
    return mapped


def resident_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("Expected VmRSS in /proc/self/status, got none.")


def kept_mib(num_blocks: int) -> float:
    """How much larger the process is after so many blocks of 1 MiB have been written and freed."""
    blocks = (ctypes.c_void_p * num_blocks)()  # made before them: what is above a freed block keeps it from the system
    before = resident_mib()
    for number in range(num_blocks):
        blocks[number] = LIBRARY.malloc(ctypes.c_size_t(MIB))
        ctypes.memset(blocks[number], 1, MIB)
    for block in blocks:
        LIBRARY.free(ctypes.c_void_p(block))
    return resident_mib() - before


def state(*, after_large_block: bool = False) -> dict[str, bool]:
    """The two thresholds, seen from outside."""
    if after_large_block:
        is_mapped(32 * MIB - 8192)  # frees it
    return {
        "maps 1 MiB": is_mapped(MIB),
        "maps 31 MiB": is_mapped(31 * MIB),
        "maps 33 MiB": is_mapped(33 * MIB),
        "keeps 40 MiB": kept_mib(40) > 20,
        "keeps 200 MiB": kept_mib(200) > 100,
    }


def main(steps: list[str]) -> None:
    tunings = {"": ProcessTuning(enabled="--off" not in steps), "2": ProcessTuning()}
    for step in steps:
        action, _, which = step.partition("-")
        if action == "start":
            tunings[which].start()
        elif action == "stop":
            tunings[which].stop()
        elif action == "describe":
            print(json.dumps(tunings[which].describe()), flush=True)
        elif action == "resident":
            print(json.dumps(resident_mib()), flush=True)
        elif action == "state":
            print(json.dumps(state(after_large_block=which == "large")), flush=True)
        elif action == "fork" and (child := os.fork()) != 0:
            os.waitpid(child, 0)
            return


if __name__ == "__main__":
    main(sys.argv[1:])
