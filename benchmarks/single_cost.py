"""The overhead per sample of running samples one at a time (``microbatch_size=1``).

    python -m benchmarks.single_cost                           # this working copy
    python -m benchmarks.single_cost --tree OTHER --pairs 9    # this one against another working copy, in pairs

    overhead = (time of a private step - time of plain forwards and backwards of the same samples, one by one) / samples

Both run in one process, in turn, on one thread, in processor time. The plain ones are bare calls of ``training_step``
and ``backward`` without a Trainer; noise, optimizer and loader are part of the private step. A figure is the median of
the pairs, and each side of a pair is the fastest of some steps, because other work on the machine only adds to them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
CASES = ("cnn", "transformer")
SAMPLES = 16


class Timer:
    """Times of steps and of plain passes of the same samples; one pair for each line of standard input."""

    def __init__(self, num: int) -> None:
        self.num, self.steps, self.began = num, list[float](), 0.0

    def begins(self, module: Any, batch: Any) -> None:
        """Take the time of the last step; after some steps, that of plain passes, and wait for the next request."""
        if self.began:
            self.steps.append(time.process_time() - self.began)
        if len(self.steps) == self.num:
            singles = [[part[row : row + 1] for part in batch] for row in range(SAMPLES)]
            plain = [plain_pass(module, singles) for _ in self.steps]
            print("took:", json.dumps([min(self.steps), min(plain)]), flush=True)
            self.steps = []
            if not sys.stdin.readline():
                os._exit(0)
        self.began = time.process_time()


def plain_pass(module: Any, singles: list[Any]) -> float:
    """Return the time of forward and backward of samples, one by one."""
    began = time.process_time()
    for single in singles:
        module.training_step(single, 0).backward()
        for parameter in module.parameters():
            parameter.grad = None
    return time.process_time() - began


def serve(name: str, num: int) -> None:
    """Run one long fit of a case with samples one at a time."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_dp import DPStrategy
    from lightning_dp.sampling import indices

    sys.path.append(str(HERE))
    from benchmarks.cases import CASES as MODELS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def draw(self: Any) -> Any:
        for _ in range(self.steps_per_epoch):
            yield self._records(self._rng.choice(self.num_own, size=self.expected_batch_size, replace=False))

    indices.PoissonBatchSampler.__iter__ = draw  # type: ignore[method-assign]
    torch.manual_seed(0)
    case, timer = MODELS[name], Timer(num)
    inputs = case.make_inputs(8 * SAMPLES)
    dataset = TensorDataset(inputs, torch.randint(case.num_classes, (len(inputs),)))

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = case.make_network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Turn(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            timer.begins(module, [tensor[:SAMPLES] for tensor in dataset.tensors])

    Turn.__module__ = "lightning_dp.benchmark"  # hooks of the user's own callbacks are watched, at a cost of their own
    trainer = L.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        strategy=DPStrategy(noise_multiplier=1000.0, target_delta=1e-6, microbatch_size=1),
        callbacks=[Turn()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(dataset, batch_size=SAMPLES, shuffle=True))


class Side:
    """A process that runs one case from one working copy."""

    def __init__(self, tree: Path, name: str, steps: int) -> None:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).resolve()),
            "--serve",
            name,
            "--steps",
            str(steps),
        ]
        pipe, environment = subprocess.PIPE, os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree)
        self._read()
        self.overhead()

    def _read(self) -> list[float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("took:"):
                found: list[float] = json.loads(line.removeprefix("took:"))
                return found
        raise RuntimeError("The process has ended.")

    def overhead(self) -> tuple[float, float]:
        """Return the overhead per sample, and the time of a plain pass per sample, in milliseconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        private, plain = self._read()
        return 1e3 * (private - plain) / SAMPLES, 1e3 * plain / SAMPLES

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Print the overhead of each case, and its ratio to that of another working copy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--tree", type=Path, help="the other working copy")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.steps)
        return
    trees = [HERE, *([options.tree.resolve()] if options.tree else [])]
    for name in options.cases:
        sides = [Side(tree, name, options.steps) for tree in trees]
        rows = [[side.overhead() for side in sides] for _ in range(options.pairs)]
        for side in sides:
            side.close()
        for number, tree in enumerate(trees):
            over, plain = (statistics.median(row[number][which] for row in rows) for which in (0, 1))
            print(f"{name}: {over:.3f} ms per sample over a plain pass of {plain:.3f} ms ({tree})")
        if len(trees) == 2:
            ratios = sorted(ours[0] / other[0] for ours, other in rows)
            low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
            print(f"{name}: overhead {middle:.2f} of the other's [{low:.2f}, {high:.2f}]", flush=True)


if __name__ == "__main__":
    main()
