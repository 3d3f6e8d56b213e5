"""The machine on which steps are timed: its name, its rates of drawing, multiplying and reading, and its figures."""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.step_floor import cost_of
from lightning_dp.noise import GaussianNoise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_noise(case: Case) -> dict[str, Any]:
    """Return milliseconds to fill a buffer of all trained parameters with noise, as a private step does."""
    sums = torch.empty(cost_of(case).parameters, device=DEVICE)
    noise = GaussianNoise()
    taken = [_milliseconds(lambda: noise.fill_(sums, 1.0)) for _ in range(25)]
    return {"ms": statistics.median(taken), "least_ms": min(taken)}


def measure_rates() -> dict[str, float]:
    """Return the best rates per millisecond: multiply-adds of a matrix product, bytes read by the norm of a vector."""
    side, length = 1024, 2**24
    left, right, vector = (torch.randn(*shape, device=DEVICE) for shape in ((side, side), (side, side), (length,)))
    product = _least_ms(lambda: left @ right)
    read = _least_ms(lambda: torch.linalg.vector_norm(vector))
    return {"mult_per_ms": side**3 / product, "bytes_per_ms": vector.nbytes / read}


def _least_ms(work: Callable[[], Any]) -> float:
    return min(_milliseconds(work) for _ in range(25))


def _milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def environment() -> dict[str, str]:
    """Return the environment of a measurement: device, processor and versions."""
    import lightning
    import opacus

    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "opacus": opacus.__version__,
        # one name stands for several generations
        "processor": f"{processor} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "noise": "mkl-random" if importlib.util.find_spec("mkl_random") else "torch",
    }


def machine_in(results: dict[str, Any], named: dict[str, str], day: str) -> dict[str, Any]:
    """Return the figures measured in this environment only, with the days of all measurements, including this one."""
    machines: list[dict[str, Any]] = results["machines"]
    machine = next((machine for machine in machines if machine["environment"] == named), None)
    if machine is None:
        machine = {"environment": named, "days": [], "cases": {}}
        machines.append(machine)
    machine["days"] = sorted({*machine["days"], day})
    return machine


def merge(machine: dict[str, Any], name: str, found: dict[str, dict[str, Any]]) -> None:
    """Replace the figures of one case for the measured modes."""
    held = machine["cases"].setdefault(name, {"time": {}, "memory": {}, "failed": {}})
    for mode in found.get("time", {}):
        held["failed"].pop(mode, None)
    for kind, figures in found.items():
        held.setdefault(kind, {}).update(figures)
