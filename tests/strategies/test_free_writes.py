"""Writes at certain batches, epochs or steps that follow public counters alone, and trials of them: all free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.strategies.test_writes_by_counts import LAST, Module, fit


class EndsWithTheRun(Module):
    """Tables end with the epoch and with the run, so that no later step can be tried."""

    def on_train_start(self) -> None:
        self.of_batches, self.of_steps = [1.0] * (LAST + 1), [1.0] * self.trainer.estimated_stepping_batches

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.factor = self.of_batches[batch_idx] * self.of_steps[self.global_step]
        return super().training_step(batch, batch_idx)


class WritesInTheLastStep(EndsWithTheRun):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == len(self.of_steps):
            self.public = 1


@pytest.mark.parametrize("kind", [WritesInTheLastStep, EndsWithTheRun])
@pytest.mark.one_in(2)
def test_trials_go_beyond_neither_epoch_nor_run(kind: type[Module]) -> None:
    assert fit(kind()) == 16


class SetsByCounts(Module):
    """The factor follows public counters only; a hook seeds the generator that each step draws from."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.drawn.append(torch.rand(()).item())
        return super().training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(7)
        if batch_idx % 2 == 1:
            self.factor = 1 / (self.count + self.global_step)

    def on_train_epoch_end(self) -> None:
        self.factor = 1 / (1 + self.current_epoch)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.slow
def test_writes_and_seeds_by_counts_are_free(accumulate: int) -> None:
    """A seed reaches no later batch."""
    module = SetsByCounts()
    assert fit(module, accumulate=accumulate) == 16 // accumulate
    assert len(set(module.drawn)) == len(module.drawn) == 16
