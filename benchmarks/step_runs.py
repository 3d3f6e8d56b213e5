"""A few steps of a case, under a Trainer or Opacus, with the times and memory peaks of ``step_cost.py``."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, default_collate

from benchmarks.cases import Case
from benchmarks.step_machine import DEVICE
from benchmarks.step_table import OPACUS
from lightning_dp import DPStrategy, RandomSparsification
from lightning_dp.sampling import indices
from lightning_dp.sampling.gather import Gather
from lightning_dp.system.allocator import give_back_freed_memory, keep_freed_memory

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "untuned": {"tune_process": False},
    "sparse": {},
    "lean": {"memory": "lean"},
    "materialize": {"grad_sample": "materialize"},
}
WARMUP = 3


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
    """A callback that records the start of each step, and the memory peak of the first step.

    It writes little after the first steps, because new kinds of writes make a private fit check records again.
    """

    now = staticmethod(time.perf_counter)

    def __init__(self, began: list[float] | None = None) -> None:
        self.began = began or []
        self.first_peak = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.tick()

    def tick(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if len(self.began) == 1:
            self.first_peak = peak_bytes()
        if len(self.began) < 2:
            forget_peak()
        self.began.append(self.now())

    def seconds_a_step(self, warmup: int) -> float:
        """Return the median of the steps after the warm-up: the check of samples at step 10 is no part of it."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.began[warmup:]))


def same_size_batches() -> None:
    """Draw batches of exactly the expected size in this process, so that both sides of a ratio do the same work."""

    def draw(self: Any) -> Any:
        for _ in range(self.steps_per_epoch):
            yield self._records(self._rng.choice(self.num_own, size=self.expected_batch_size, replace=False))

    indices.PoissonBatchSampler.__iter__ = draw  # type: ignore[method-assign]


def lightning_steps(case: Case, mode: str, clock: Clock, steps: int) -> None:
    """Run a number of steps inside ``Trainer.fit``."""
    sparse = RandomSparsification(0.9, schedule="constant", refresh=10**6)
    if mode == "kept":
        keep_freed_memory()
    strategy = (
        "auto" if mode in ("plain", "kept") else DPStrategy(noise_multiplier=1.0, target_delta=1e-6, **OURS[mode])
    )
    trainer_steps(case, strategy, [clock, sparse] if mode == "sparse" else [clock], steps, gathers=mode == "kept")


def trainer_steps(case: Case, strategy: Any, callbacks: list[L.Callback], steps: int, *, gathers: bool = False) -> None:
    """Run a number of steps of a case under any strategy and callbacks."""
    dataset = case.make_dataset()
    loader = DataLoader(dataset, batch_size=case.batch_size, shuffle=True)
    if gathers:
        rows = Gather.of(dataset, default_collate)
        assert rows is not None
        loader = DataLoader(rows, case.batch_size, sampler=RandomSampler(dataset), collate_fn=rows.collate)
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=steps,
        strategy=strategy,
        precision=case.precision,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )
    trainer.fit(Classifier(case), loader)


def opacus_steps(case: Case, mode: str, clock: Clock, steps: int) -> None:
    """Run a number of steps of Opacus in a plain loop."""
    from opacus.grad_sample.utils import wrap_model
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    torch.manual_seed(0)
    dataset = case.make_dataset()
    module = case.make_network().to(DEVICE)
    for layer in module.modules():
        if hasattr(layer, "expand_positions"):
            layer.expand_positions = True
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": case.batch_size}
    ghost = mode == "ghost"
    wrapped = wrap_model(module, grad_sample_mode=mode, **({"max_grad_norm": 1.0} if ghost else {}))
    plain = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    optimizer: Any = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(plain, **options)
    criterion: Any = nn.CrossEntropyLoss()
    if ghost:
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
    half = torch.autocast(DEVICE.type, torch.bfloat16) if case.precision == "bf16-mixed" else contextlib.nullcontext()
    for _ in range(steps):
        clock.tick()
        chosen = torch.randint(len(dataset), (case.batch_size,))
        inputs, labels = (tensor[chosen].to(DEVICE) for tensor in dataset.tensors)
        optimizer.zero_grad()
        with half:
            loss = criterion(wrapped(inputs), labels)
        loss.backward()
        optimizer.step()


def run(case: Case, mode: str, steps: int, warmup: int = WARMUP) -> Clock:
    """Run warm-up steps, the timed steps, and one more, whose beginning ends the last."""
    gc.collect()
    clock = Clock()
    (opacus_steps if mode in OPACUS else lightning_steps)(case, mode, clock, warmup + steps + 1)
    return clock


def resident(field: str) -> int:
    """Return a field of the kernel's memory account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Expected {field} in /proc/self/status, got none. Memory is measured on Linux only.")


def forget_peak() -> None:
    """Reset the memory peak."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        give_back_freed_memory()  # what is free in the heap is not needed
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the highest memory since the peak was reset."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident("VmHWM")
