"""What does a private step cost against the same step without privacy, and against Opacus?

    python benchmarks/step_cost.py                       # the whole table: benchmarks/step_cost.json and README.md
    python benchmarks/step_cost.py --cases mlp --pairs 7 --modes ours

Step against step, both in a Lightning Trainer with automatic optimization, noise and optimizer included. A and B run in
turn; a figure is the median of the pairs' ratios. Opacus runs in a plain loop, its best case. Batches have a fixed size on
all sides, so that all do the same work. Peak memory comes from a process of its own a case: highest resident size
while stepping, less what was resident before the model was made.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.cases import CASES, Case
from lightning_dp import DPStrategy
from lightning_dp.sampling import indices

HERE = Path(__file__).parent
OURS = {"ours": {}, "lean": {"memory": "lean"}, "materialize": {"grad_sample": "materialize"}}
OPACUS = ("hooks", "functorch", "ew", "ghost")
MODES = ("plain", *OURS, *OPACUS)


class Classifier(L.LightningModule):
    """The network with cross-entropy and SGD."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = case.make_network()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Clock(L.Callback):
    """When each step began."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.began.append(time.perf_counter())


def same_size_batches() -> None:
    """Draws of exactly the expected size, for this process: both sides of a ratio do the same work."""

    def draw(self: Any) -> Any:
        for _ in range(self.steps_per_epoch):
            yield self._records(self._rng.choice(self.num_own, size=self.expected_batch_size, replace=False))

    indices.PoissonBatchSampler.__iter__ = draw  # type: ignore[method-assign]


def lightning_steps(case: Case, mode: str, steps: int, warmup: int, precision: str) -> float:
    """Seconds a step inside ``Trainer.fit``, after the warm-up."""
    clock = Clock()
    strategy: Any = "auto" if mode == "plain" else DPStrategy(noise_multiplier=1.0, target_delta=1e-6, **OURS[mode])
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=warmup + steps + 1,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        devices=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )
    trainer.fit(Classifier(case), DataLoader(case.make_dataset(), batch_size=case.batch_size, shuffle=True))
    return (clock.began[-1] - clock.began[warmup]) / (len(clock.began) - 1 - warmup)


def opacus_steps(case: Case, mode: str, steps: int, warmup: int) -> float:
    """Seconds a step of Opacus in a plain loop."""
    from opacus import GradSampleModule
    from opacus.grad_sample.utils import wrap_model
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    torch.manual_seed(0)
    dataset = case.make_dataset()
    module = case.make_network()
    module.train()
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": case.batch_size}
    if mode == "ghost":
        wrapped = wrap_model(module, grad_sample_mode="ghost", max_grad_norm=1.0)
    else:
        wrapped = wrap_model(module, grad_sample_mode=mode)
    plain = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    optimizer: Any = (
        DPOptimizerFastGradientClipping(plain, **options) if mode == "ghost" else DPOptimizer(plain, **options)
    )
    criterion: Any = nn.CrossEntropyLoss()
    if mode == "ghost":
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
    assert isinstance(wrapped, GradSampleModule)
    began = []
    for step in range(warmup + steps + 1):
        chosen = torch.randint(len(dataset), (case.batch_size,))
        inputs, labels = (tensor[chosen] for tensor in dataset.tensors)
        began.append(time.perf_counter())
        optimizer.zero_grad()
        criterion(wrapped(inputs), labels).backward()
        optimizer.step()
        assert step >= 0
    return (began[-1] - began[warmup]) / steps


def seconds(case: Case, mode: str, steps: int, warmup: int, precision: str = "32-true") -> float:
    """Seconds a step in one mode."""
    gc.collect()
    if mode in OPACUS:
        return opacus_steps(case, mode, steps, warmup)
    return lightning_steps(case, mode, steps, warmup, precision)


def resident(field: str) -> int:
    """A field of the kernel's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(case: Case, mode: str) -> int:
    """Peak bytes of a few steps, less what was resident before."""
    same_size_batches()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds(case, mode, 4, 1)
    return resident("VmHWM") - before


def memory_in_own_process(case: Case, mode: str) -> int | None:
    """The same in a fresh process; None if the mode does not run."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--memory", case.name, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def run_case(case: Case, modes: list[str], pairs: int, target_seconds: float, with_memory: bool) -> dict[str, Any]:
    """All modes of a case against the step without privacy, pair by pair."""
    base = seconds(case, "plain", 3, 2)
    steps = max(3, min(60, round(target_seconds / base)))
    ratios: dict[str, list[float]] = {mode: [] for mode in modes}
    plain: list[float] = []
    failed: dict[str, str] = {}
    for _ in range(pairs):
        for mode in modes:
            if mode in failed:
                continue
            first = seconds(case, "plain", steps, 3)
            try:
                second = seconds(case, mode, steps, 3)
            except Exception as error:  # a peer that cannot run a model is a result
                failed[mode] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            plain.append(first)
            ratios[mode].append(second / first)
    result: dict[str, Any] = {
        "plain_ms": 1e3 * statistics.median(plain),
        "steps": steps,
        "failed": failed,
        "time": {},
        "memory": {},
    }
    for mode, values in ratios.items():
        if values:
            result["time"][mode] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "pairs": len(values),
            }
    if with_memory:
        base_bytes = memory_in_own_process(case, "plain")
        result["plain_bytes"] = base_bytes
        for mode in modes:
            peak = memory_in_own_process(case, mode)
            if peak and base_bytes:
                result["memory"][mode] = peak / base_bytes
    return result


def environment() -> dict[str, str]:
    """What the figures were measured with."""
    import lightning
    import opacus

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "opacus": opacus.__version__,
        "processor": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--modes", nargs="+", default=list(MODES[1:]), choices=MODES)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of stepping on each side of a pair, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "step_cost.json")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.memory:
        print(measure_memory(CASES[options.memory[0]], options.memory[1]))
        return
    same_size_batches()
    results: dict[str, Any] = {"environment": environment(), "cases": {}}
    if options.out.exists():
        results["cases"] = json.loads(options.out.read_text())["cases"]
    for name in options.cases:
        result = run_case(CASES[name], options.modes, options.pairs, options.seconds, not options.no_memory)
        results["cases"][name] = result
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        row = ", ".join(f"{mode} {figures['median']:.2f}" for mode, figures in result["time"].items())
        memory = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in result["memory"].items())
        print(f"{name}: {result['plain_ms']:.1f} ms; time {row}; memory {memory}; {result['failed'] or ''}", flush=True)


if __name__ == "__main__":
    main()
