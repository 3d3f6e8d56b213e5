"""What a training step might do that would let one sample out un-noised, or make epsilon too small: refused, or
paid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.trial import Trial
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_manual import Manual


def private(**options: Any) -> DPStrategy:
    return DPStrategy(**{"noise_multiplier": 1.3, "target_delta": 1e-3, **options})


# ---------------------------------------------------------------- raw gradients


def test_discriminator_frozen_and_thawed_is_always_noised(tmp_path: Path) -> None:
    """WGAN style: requires_grad goes off at the end of each training step and on at the top of the next."""

    class Switching(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.network.requires_grad_(True)
            super().training_step(batch, batch_idx)
            self.network.requires_grad_(False)

    recorder = Recorder()
    strategy = private(noise_multiplier=100.0)
    make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=2).fit(Switching(lr=0.0), make_loader())
    assert strategy.ledger.num_steps == 8
    for seen in recorder.before_step:
        assert float(torch.cat([g.flatten() for g in seen.values()]).norm()) > 100.0 * 0.5 * 53**0.5 / 16


@pytest.mark.parametrize("begins", [0, 2, 5])
@pytest.mark.one_in(3)
def test_a_loss_over_the_batch_that_begins_later_trains_no_step(tmp_path: Path, begins: int) -> None:
    class Curriculum(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            scores = self(batch[0])
            scores = scores - scores.mean(0) if self.global_step >= begins else scores
            return nn.functional.cross_entropy(scores, batch[1])

    strategy = private()
    with pytest.raises(PrivacyError, match=r"differ by|to be its gradient when run alone"):
        make_trainer(strategy, tmp_path, max_epochs=2).fit(Curriculum(), make_loader())
    assert strategy.ledger.num_steps == begins


def steps_of_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which checks are repeated from here on."""
    steps: list[int] = []
    check_again = Trial.check_again

    def noted(trial: Trial, number: int, *more: Any) -> None:
        steps.append(number)
        check_again(trial, number, *more)

    monkeypatch.setattr(Trial, "check_again", noted)
    return steps


@pytest.mark.slow
def test_a_loss_of_one_form_is_checked_at_the_usual_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, steps = private(), steps_of_checks(monkeypatch)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Classifier(), make_loader(80))
    assert steps == [1]
    assert strategy.state.checked_steps == [0, 1]
    assert strategy.ledger.num_steps == 4


def test_checks_that_data_ask_for_are_not_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of a batch may choose the form of its loss, and the statement carries no noise."""

    class Branching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss.exp().log() if self.global_step in (2, 9) else loss

    strategy, steps = private(), steps_of_checks(monkeypatch)
    make_trainer(strategy, tmp_path, max_epochs=3).fit(Branching(), make_loader())
    assert steps == [1, 2, 9]
    assert strategy.state.checked_steps == [0, 1, 9]


def test_a_layer_unfrozen_within_the_step_is_refused(tmp_path: Path) -> None:
    class Late(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.network[0].requires_grad_(batch_idx >= 2)
            return super().training_step(batch, batch_idx)

    module = Late()
    module.network[0].requires_grad_(False)
    with pytest.raises(PrivacyError, match=r"raw one of 'network\.0\.weight'"):
        make_trainer(private(), tmp_path).fit(module, make_loader())


def test_a_layer_outside_the_module_is_refused(tmp_path: Path) -> None:
    class Hidden(Classifier):
        def on_train_start(self) -> None:
            self.__dict__["hidden"] = nn.Linear(NUM_CLASSES, NUM_CLASSES)
            self.trainer.optimizers[0].add_param_group({"params": list(self.hidden.parameters())})

        def forward(self, features: Tensor) -> Tensor:
            return self.hidden(self.network(features))

    with pytest.raises(PrivacyError, match="not in the module"):
        make_trainer(private(), tmp_path).fit(Hidden(), make_loader())


def test_exhausted_iterator_in_the_step_is_an_error(tmp_path: Path) -> None:
    """Lightning takes a StopIteration under manual optimization for the end of the data: the step would silently not be
    taken.
    """

    class Exhausted(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            next(iter([]))

    with pytest.raises(RuntimeError, match="training_step raised StopIteration"):
        make_trainer(private(check_per_sample=False), tmp_path).fit(Exhausted(), make_loader())


# ---------------------------------------------------------------- one sample, one contribution


@pytest.mark.parametrize("microbatch_size", [1, 2])
@pytest.mark.one_in(2)
def test_several_steps_a_batch_in_microbatches_are_refused(tmp_path: Path, microbatch_size: int) -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match="enter the sum twice"):
        make_trainer(private(microbatch_size=microbatch_size), tmp_path).fit(Twice(), make_loader(batch_size=32))


@pytest.mark.slow
def test_accumulation_may_not_change_during_the_run(tmp_path: Path) -> None:
    """Parts of several logical batches would be summed: one sample may be in each."""

    class Growing(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.accumulate_grad_batches = 1 + trainer.current_epoch

    strategy = private()
    with pytest.raises(PrivacyError, match="accumulate_grad_batches=1 as when the data was set up, got 2"):
        make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[Growing()]).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 4


@pytest.mark.parametrize("weight", [0.5, 0.7])
@pytest.mark.parametrize("repeat", range(4))
@pytest.mark.one_in(4)
def test_mixing_after_the_transfer_is_always_found(tmp_path: Path, weight: float, repeat: int) -> None:
    class Mixing(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.trainer.training:
                return batch
            features, labels = batch
            return [weight * features + (1 - weight) * features[torch.randperm(len(features))], labels]

    torch.manual_seed(repeat)
    with pytest.raises(PrivacyError, match="network"):
        make_trainer(private(), tmp_path).fit(Mixing(), make_loader())


def test_mixup_with_numpys_draws_is_found(tmp_path: Path) -> None:
    class Mixup(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features, labels = batch
            share = np.random.beta(0.2, 0.2)  # noqa: NPY002
            return nn.functional.cross_entropy(
                self(share * features + (1 - share) * features[torch.randperm(len(features))]), labels
            )

    with pytest.raises(PrivacyError, match="network"):
        make_trainer(private(), tmp_path).fit(Mixup(), make_loader())


def test_sorted_data_does_not_hide_a_class_weighted_mean(tmp_path: Path) -> None:
    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 25.0]))

    features, labels = make_dataset().tensors
    order = labels.argsort()
    loader = DataLoader(TensorDataset(features[order], labels[order]), batch_size=16)
    with pytest.raises(PrivacyError, match="network"):
        make_trainer(private(), tmp_path).fit(Weighted(), loader)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_batch_norm_switched_to_training_later_is_refused(tmp_path: Path) -> None:
    class Thawing(Classifier):
        def on_train_start(self) -> None:
            self.network[1].eval()

        def on_train_epoch_start(self) -> None:
            self.network[1].train(self.current_epoch > 0)

    network = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, NUM_CLASSES))
    network[1].eval()
    strategy = private()
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        make_trainer(strategy, tmp_path, max_epochs=2).fit(Thawing(network), make_loader())
    assert strategy.ledger.num_steps == 4


def test_hooks_see_a_batch_of_length_zero_when_nothing_was_drawn(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Unpacking(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            features, labels = batch
            assert features.shape[1:] == (NUM_FEATURES,)
            sizes.append(len(labels))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("size", float(len(batch[0])), on_step=False, on_epoch=True, batch_size=1)

    make_trainer(private(), tmp_path).fit(Unpacking(), make_loader(batch_size=1))
    assert 0 in sizes


@pytest.mark.slow
def test_losses_a_sample_under_a_sum(tmp_path: Path) -> None:
    class Losses(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    seen = []
    for reduction in ("mean", "sum"):
        recorder = Recorder()
        strategy = private(noise_multiplier=0.0, loss_reduction=reduction)
        make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(Losses(lr=0.0), make_loader(batch_size=64))
        seen.append(recorder.before_step[0])
    torch.testing.assert_close(*seen)
