"""Long runs: what is kept of a step does not grow with the steps before it."""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DPStrategy, EpsilonMonitor
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_loader, make_trainer

STEPS = 100_000


def saved_bytes(value: Any) -> int:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


@pytest.mark.parametrize("num_sigmas", [1, 10])
@pytest.mark.one_in(2)
def test_ledger_stays_small_over_a_hundred_thousand_steps(num_sigmas: int) -> None:
    """One step at a time, with epsilon asked for on the way; what is kept is that of two steps a sigma, but for
    digits.
    """
    ledger, short, accountant = Ledger(), Ledger(), make_accountant("rdp")
    epsilons, kept = [], []
    for number in range(num_sigmas):
        event = PrivacyEvent.poisson(noise_multiplier=4.0 - 0.05 * number, sample_rate=0.001)
        short.record(event, 2)
        for step in range(STEPS // num_sigmas):
            ledger.record(event)
            if number == 0 and step % (STEPS // num_sigmas // 5) == 1:
                epsilons.append(accountant.epsilon(ledger, 1e-5))
                kept.append(len(pickle.dumps((ledger, accountant))))
    assert ledger.num_steps == STEPS
    assert len(ledger.entries) == num_sigmas
    assert epsilons == sorted(set(epsilons))
    assert len(epsilons) == 5
    assert max(kept) - min(kept) < 64
    for size in (saved_bytes, lambda state: len(json.dumps(state))):
        assert size(ledger.state_dict()) - size(short.state_dict()) <= 64 * num_sigmas


class Watch(L.Callback):
    """Every 250 steps: resident memory, and what a checkpoint would take."""

    def __init__(self) -> None:
        self.memory: list[int] = []
        self.sizes: list[int] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % 250 == 0:
            gc.collect()
            self.memory.append(4096 * int(Path("/proc/self/statm").read_text().split()[1]))
            path = Path(trainer.default_root_dir) / "now.ckpt"
            trainer.save_checkpoint(path)
            self.sizes.append(path.stat().st_size)


def long_run(folder: Path) -> tuple[list[int], list[int], int, int]:
    """1,000 steps: resident memory and sizes of checkpoints on the way, and what the ledger counts in how many
    entries.
    """
    watch = Watch()
    strategy = DPStrategy(noise_multiplier=2.0, target_delta=1e-5, accountant="rdp")
    trainer = make_trainer(strategy, folder, callbacks=[watch, EpsilonMonitor()], max_epochs=-1, max_steps=1_000)
    network = torch.nn.Sequential(torch.nn.Linear(6, 400), torch.nn.Tanh(), torch.nn.Linear(400, 3))
    trainer.fit(Classifier(network=network), make_loader())
    return watch.memory, watch.sizes, strategy.ledger.num_steps, len(strategy.ledger.entries)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use as Linux tells it")
def test_run_of_thousands_of_steps_stays_small(tmp_path: Path) -> None:
    """From step 500 to step 1,000 less than 4 MB more, where one kept sum a step would be 8 MB; files within 1 %.

    In a process of its own: the heap of one that has run other tests may grow by a block of theirs at any time.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        memory, sizes, num_steps, num_entries = pool.submit(long_run, tmp_path).result(timeout=280)
    assert (num_steps, num_entries) == (1_000, 1)
    assert max(memory) - memory[1] < 4_000_000
    assert max(later / earlier for earlier, later in itertools.pairwise(sizes)) < 1.01
