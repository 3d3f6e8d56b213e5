"""What benchmarks/gpu_check.py checks, held to bounds: on a GPU with ``-m gpu``, in small on the CPU with ``-m
slow``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_once, run_script

ROOT = Path(__file__).parents[1]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def run_check(folder: Path, *, visible: bool) -> None:
    """Write down what the script prints, in a process that has not used a GPU, if there is one."""
    if not torch.cuda.is_available():
        printed = run_script(ROOT / "benchmarks" / "gpu_check.py", "--smoke", folder=folder)
        (folder / "printed").write_text(printed)
        return
    environment = {**os.environ, **({} if visible else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed").write_text(done.stdout)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU]),
        pytest.param("cpu", marks=pytest.mark.slow),
    ],
)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the script on a device, by part."""
    folder = run_once(
        f"gpu_check-{request.param}", tmp_path_factory, lambda out: run_check(out, visible=request.param == "cuda")
    )
    lines = [json.loads(line) for line in (folder / "printed").read_text().splitlines() if line.startswith("{")]
    results = {name: result for line in lines for name, result in line.items()}
    assert (results["device"] == "cpu") == (request.param == "cpu")
    return results


def test_gpu_check_gradients_are_those_of_single_samples(found: dict[str, Any]) -> None:
    assert found["engine"].pop("lstm") < 2e-3  # cuDNN's kernels
    assert max(found["engine"].values()) < 2e-6


def test_gpu_check_short_norms_bound_their_sums(found: dict[str, Any]) -> None:
    assert found["short"]["short"] == (found["device"] != "cpu")
    assert found["short"]["norm"] > 1 - 1e-6
    assert 0 < found["short"]["sum"] <= 1 + 1e-5


def test_gpu_check_waits_do_not_grow_with_the_depth(found: dict[str, Any]) -> None:
    few, many = found["waits"].values()
    assert few == many <= 4  # two of them move the batch


def test_gpu_check_noise_has_its_standard_deviation(found: dict[str, Any]) -> None:
    """2^22 draws: 5 standard errors are 0.0017."""
    assert abs(found["noise"] - 1) < 5 / (2 * 2**22) ** 0.5


def test_gpu_check_fits_end_at_the_same_epsilon(found: dict[str, Any]) -> None:
    assert len(found["fits"]) == 4
    assert len(set(found["fits"].values())) == 1


def test_gpu_check_sharded_sum_is_that_of_one_device(found: dict[str, Any]) -> None:
    assert found["sharded"] < 1e-5


def test_gpu_check_measures_every_model(found: dict[str, Any]) -> None:
    for name in ("ViT-B/16-sized", "BERT-base-sized", "GPT-2-sized"):
        assert found[name]["low"] <= found[name]["time"] <= found[name]["high"]
    for name in ("vit", "bert"):
        assert isinstance(found[f"Opacus, {name}"]["ghost"], float)
