"""Effects of random sparsification other than accuracy: bytes in the all-reduce, and gradient inversion at equal
epsilon.

    python benchmarks/sparsification.py            # both studies, a few minutes of one core
    python benchmarks/sparsification.py --report   # section and plots from the file

Bytes are counted where the collective is called: whatever operation of ``torch.distributed`` a process issues during
``Trainer.fit`` with two gloo processes, by whoever, is intercepted and the size of its tensors added up, step by step.
What the library logs as ``communication/bytes_per_step`` is noted with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import inversion, sparsification_report
from benchmarks.readme import write_section
from benchmarks.tasks import TASKS, Classifier, be_quiet
from lightning_dp import DPDDPStrategy, RandomSparsification

HERE = Path(__file__).parent
DELTA = 1e-5
FINAL_RATE = 0.9
EPSILONS = (None, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0)
NUM_SHOWN = 2  # images whose reconstructions are drawn


class Collectives(TorchDispatchMode):
    """A counter of collective operations, and of the bytes of sums in all-reduces.

    Ranks also agree on checks by all-reduces of one whole number, and compare themselves by all-gathers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].rstrip("_")
            self.calls[name] = self.calls.get(name, 0) + 1
            if name == "allreduce":
                tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
                self.bytes += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        return func(*args, **(kwargs or {}))


class Counter(L.Callback):
    """A callback that notes the bytes of sums in all-reduces and the figure that the library logs."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.collectives.bytes = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gradient = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])
        self.steps.append(
            {
                "masked": round(float((gradient == 0).float().mean()), 6),
                "bytes": float(self.collectives.bytes),
                "logged": float(trainer.callback_metrics.get("communication/bytes_per_step", torch.nan)),
            }
        )


def two_processes(out: Path, epochs: int) -> None:
    """Train digits in this process and another, and write the counts of rank 0."""
    be_quiet()
    task = TASKS["digits"]
    counted: dict[str, Any] = {"world_size": 2, "backend": "gloo"}
    for name, rate in (("dense", 0.0), ("sparsified", FINAL_RATE)):
        collectives = Collectives()
        counter = Counter(collectives)
        trainer = L.Trainer(
            max_epochs=epochs,
            strategy=DPDDPStrategy(target_epsilon=1.0, target_delta=DELTA, process_group_backend="gloo"),
            callbacks=[RandomSparsification(rate), counter],
            accelerator="cpu",
            devices=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Classifier(task.make_network, lr=1.0)
        with collectives:
            trainer.fit(module, DataLoader(task.for_report.train, batch_size=task.batch_size // 2, shuffle=True))
        counted[name] = counter.steps
        counted["parameters"] = sum(parameter.numel() for parameter in module.parameters())
        counted["calls"] = {**counted.get("calls", {}), name: dict(collectives.calls)}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        out.write_text(json.dumps(counted))


def measure_bytes(epochs: int) -> dict[str, Any]:
    """Run the two processes and return their counts, one line per epoch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--two-processes", str(out)]
        subprocess.run([*command, "--epochs", str(epochs)], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        counted: dict[str, Any] = json.loads(out.read_text())
    for name in ("dense", "sparsified"):
        steps = counted[name]
        counted[name] = steps[:1] + [step for before, step in itertools.pairwise(steps) if step != before]
    return counted


def attack(images: int, seeds: int, starts: int, steps: int, epsilons: tuple[float | None, ...]) -> dict[str, Any]:
    """Invert the released gradients of a number of training images, dense and sparsified.

    Returns:
        By rate and epsilon: squared errors and whether the nearest training image is the right one, an image a row.
    """
    split = TASKS["digits"].for_report
    train_images, labels = split.train.tensors
    prior = inversion.Prior.of(split.held_out.tensors[0])
    truth = train_images[:images]
    results: dict[str, Any] = {"images": images, "seeds": seeds, "settings": {}, "shown": {"original": _shown(truth)}}
    guess = (prior.mean - truth).square().mean(1)
    results["guess"] = {"mse": _rounded(guess)}
    for rate in (0.0, FINAL_RATE):
        for epsilon in epsilons:
            found = torch.stack(
                [_inverted(truth, labels, rate, epsilon, prior, seed, starts, steps) for seed in range(seeds)]
            )
            key = f"{rate:g} {'none' if epsilon is None else format(epsilon, 'g')}"
            nearest = torch.cdist(found, train_images[None]).argmin(2)
            results["settings"][key] = {
                "mse": _rounded((found - truth).square().mean((0, 2))),
                "identified": _rounded((nearest == torch.arange(images)).float().mean(0)),
            }
            results["shown"][key] = _shown(found[0])
            print(f"rate, epsilon {key}: mean squared error {(found - truth).square().mean():.4f}", flush=True)
    return results


def _inverted(
    truth: torch.Tensor,
    labels: torch.Tensor,
    rate: float,
    epsilon: float | None,
    prior: inversion.Prior,
    seed: int,
    starts: int,
    steps: int,
) -> torch.Tensor:
    labels = labels[: len(truth)]
    releases = [
        inversion.release(TensorDataset(image[None], label[None]), epsilon=epsilon, rate=rate, seed=seed, delta=DELTA)
        for image, label in zip(truth, labels, strict=True)
    ]
    return inversion.invert(releases, labels, prior, seed=seed, starts=starts, steps=steps)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]


def _shown(images: torch.Tensor) -> list[list[float]]:
    return [[round(float(pixel), 2) for pixel in image] for image in images[:NUM_SHOWN]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=["bytes", "inversion"], choices=["bytes", "inversion"])
    parser.add_argument("--epochs", type=int, default=30, help="of the two-process runs")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--starts", type=int, default=3, help="of the search for an image")
    parser.add_argument("--steps", type=int, default=300, help="of the search, each start")
    parser.add_argument("--smoke", action="store_true", help="the smallest runs of everything")
    parser.add_argument("--report", action="store_true", help="no runs: section and plots from the file")
    parser.add_argument("--out", type=Path, default=HERE / "sparsification.json")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--two-processes", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.two_processes:
        two_processes(options.two_processes, options.epochs)
        return
    be_quiet()
    if options.smoke:
        options.epochs, options.images, options.seeds, options.starts, options.steps = 2, 2, 1, 1, 20
    epsilons = (None, 10.0) if options.smoke else EPSILONS
    studies: dict[str, Callable[[], dict[str, Any]]] = {
        "bytes": lambda: measure_bytes(options.epochs),
        "inversion": lambda: attack(options.images, options.seeds, options.starts, options.steps, epsilons),
    }
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in [] if options.report else options.studies:
        results[name] = studies[name]()
        options.out.write_text(json.dumps(results) + "\n")
    sparsification_report.plot(results, options.out.parent)
    write_section("sparsification", sparsification_report.section(results), readme=options.readme)


if __name__ == "__main__":
    main()
