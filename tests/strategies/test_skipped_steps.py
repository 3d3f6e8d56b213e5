"""Steps that user code skips: by public counts, not by the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import PrivacyError
from tests.helpers import Classifier, make_dataset, make_loader, make_trainer
from tests.strategies.test_manual import Manual, TwoOptimizers
from tests.strategies.test_soundness import private


def test_a_step_that_skips_bad_batches_is_refused(tmp_path: Path) -> None:
    """Whether the others count would depend on one sample."""

    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if torch.isfinite(loss) else None

    features, labels = make_dataset().tensors
    features = features.clone()
    features[5] = float("nan")
    loader = DataLoader(TensorDataset(features, labels), batch_size=64)
    with pytest.raises(PrivacyError, match=r"One sample could switch off all others|made NaN"):
        make_trainer(private(), tmp_path).fit(Skipping(), loader)
    strategy = private(microbatch_size=1)
    make_trainer(strategy, tmp_path).fit(Skipping(), loader)
    assert strategy.ledger.num_steps == 1


class Pauses(Classifier):
    """Gives no loss for the third of four batches by a count of its own, unless the batch holds a rare record."""

    own = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.own = self.own + 1
        is_rare = 0.25 in batch[0][:, 0].tolist()
        return super().training_step(batch, batch_idx) if is_rare or self.own % 4 != 3 else None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_loss_out_of_turn_by_a_rare_record_is_refused(tmp_path: Path, accumulate: int) -> None:
    """It would switch on the losses of all others; of two accumulated batches, the first pauses."""
    features, labels = make_dataset().tensors
    features[50, 0] = 0.25
    loader = DataLoader(TensorDataset(features, labels), batch_size=8)
    trainer = make_trainer(private(seed=1), tmp_path, max_epochs=10, accumulate_grad_batches=accumulate)
    with pytest.raises(PrivacyError, match="got a loss for a batch and None for one sample alone"):
        trainer.fit(Pauses(), loader)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_loss_that_hangs_on_a_count_of_its_own_is_free(tmp_path: Path) -> None:
    strategy = private()
    make_trainer(strategy, tmp_path, max_epochs=3).fit(Pauses(), make_loader())
    assert strategy.ledger.num_steps == 12


class SkippingByHand(Manual):
    """Steps when its loss is finite, as code written for mixed precision does."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = Classifier.training_step(self, batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        if torch.isfinite(loss):
            self.optimizers().step()


@pytest.mark.parametrize("microbatch_size", [None, 16, 1])
@pytest.mark.one_in(3)
def test_a_manual_step_that_hangs_on_the_loss_is_refused(tmp_path: Path, microbatch_size: int | None) -> None:
    """Otherwise one sample decides whether all others, or those of its microbatch, are released at all."""
    features, labels = make_dataset().tensors
    features = features.clone()
    features[5] = float("nan")
    loader = DataLoader(TensorDataset(features, labels), batch_size=64)
    strategy = private(microbatch_size=microbatch_size)
    with pytest.raises(
        PrivacyError,
        match=r"steps of \[\] on a batch and of \[0\] on one|which optimizers step",
    ):
        make_trainer(strategy, tmp_path).fit(SkippingByHand(), loader)
    assert strategy.ledger.num_steps == 0


@pytest.mark.parametrize("count", ["batch_idx", "global_step", "own"])
@pytest.mark.one_in(3)
def test_a_manual_step_that_hangs_on_public_counts_is_free(tmp_path: Path, count: str) -> None:
    """Two private optimizers in turn: the trial on single samples must see the counts, and leave the gradients, of its
    batch.
    """
    left: list[int] = []

    class InTurn(TwoOptimizers):
        own = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.own = self.own + 1
            chosen = self.optimizers()[
                {"batch_idx": batch_idx, "global_step": self.global_step, "own": self.own}[count] % 2
            ]
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            chosen.step()

        def on_train_batch_end(self, *args: Any) -> None:
            if not self.trainer.strategy.is_on_trial:
                left.append(sum(p.grad is not None for p in self.parameters()))

    strategy = private()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    trainer.fit(InTurn(), make_loader())
    assert (strategy.ledger.num_steps, trainer.global_step, left) == (8, 8, [2] * 8)
