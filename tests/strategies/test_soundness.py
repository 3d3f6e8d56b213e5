"""What a training step might do that would let one sample out un-noised, or make epsilon too small: refused, or paid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyBudget, PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_manual import GAN, Manual, TwoOptimizers


def rdp(**options: Any) -> DPStrategy:
    return DPStrategy(**{"noise_multiplier": 1.3, "target_delta": 1e-3, "accountant": "rdp", **options})


# ---------------------------------------------------------------- raw gradients


def test_a_discriminator_switched_off_and_on_is_noised_at_every_step(tmp_path: Path) -> None:
    """WGAN style: requires_grad goes off at the end of each training step and on at the top of the next."""

    class Switching(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.network.requires_grad_(True)
            super().training_step(batch, batch_idx)
            self.network.requires_grad_(False)

    recorder = Recorder()
    strategy = rdp(noise_multiplier=100.0)
    make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=2).fit(Switching(lr=0.0), make_loader())
    assert strategy.ledger.num_steps == 8
    for seen in recorder.before_step:
        assert float(torch.cat([g.flatten() for g in seen.values()]).norm()) > 100.0 * 0.5 * 53**0.5 / 16


def test_a_layer_unfrozen_within_the_step_is_refused(tmp_path: Path) -> None:
    class Late(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.network[0].requires_grad_(batch_idx >= 2)
            return super().training_step(batch, batch_idx)

    module = Late()
    module.network[0].requires_grad_(False)
    with pytest.raises(PrivacyError, match=r"raw one of 'network\.0\.weight'"):
        make_trainer(rdp(), tmp_path).fit(module, make_loader())


def test_a_layer_outside_the_module_is_refused(tmp_path: Path) -> None:
    class Hidden(Classifier):
        def on_train_start(self) -> None:
            self.__dict__["hidden"] = nn.Linear(NUM_CLASSES, NUM_CLASSES)
            self.trainer.optimizers[0].add_param_group({"params": list(self.hidden.parameters())})

        def forward(self, features: Tensor) -> Tensor:
            return self.hidden(self.network(features))

    with pytest.raises(PrivacyError, match="not in the module"):
        make_trainer(rdp(), tmp_path).fit(Hidden(), make_loader())


def test_an_exhausted_iterator_in_the_step_is_not_the_end_of_the_data(tmp_path: Path) -> None:
    """Lightning takes a StopIteration under manual optimization for the end of the data: the step would silently not be taken."""

    class Exhausted(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            next(iter([]))

    with pytest.raises(RuntimeError, match="got a StopIteration out of it"):
        make_trainer(rdp(check_per_sample=False), tmp_path).fit(Exhausted(), make_loader())


# ---------------------------------------------------------------- one sample, one contribution


@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_several_steps_a_batch_in_microbatches_are_refused(tmp_path: Path, microbatch_size: int) -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match="enter the sum twice"):
        make_trainer(rdp(microbatch_size=microbatch_size), tmp_path).fit(Twice(), make_loader(batch_size=32))


def test_a_step_that_skips_bad_batches_is_refused(tmp_path: Path) -> None:
    """Whether the others count would hang on one sample."""

    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if torch.isfinite(loss) else None

    features, labels = make_dataset().tensors
    features = features.clone()
    features[5] = float("nan")
    loader = DataLoader(TensorDataset(features, labels), batch_size=64)
    with pytest.raises(PrivacyError, match="One sample could switch off all others"):
        make_trainer(rdp(), tmp_path).fit(Skipping(), loader)
    strategy = rdp(microbatch_size=1)
    make_trainer(strategy, tmp_path).fit(Skipping(), loader)
    assert strategy.ledger.num_steps == 1


class SkippingByHand(Manual):
    """Steps when its loss is finite, as code written for mixed precision does."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = Classifier.training_step(self, batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        if torch.isfinite(loss):
            self.optimizers().step()


@pytest.mark.parametrize("microbatch_size", [None, 16, 1])
def test_a_manual_step_that_hangs_on_the_loss_is_refused(tmp_path: Path, microbatch_size: int | None) -> None:
    """Otherwise one sample decides whether all others, or those of its microbatch, are released at all."""
    features, labels = make_dataset().tensors
    features = features.clone()
    features[5] = float("nan")
    loader = DataLoader(TensorDataset(features, labels), batch_size=64)
    strategy = rdp(microbatch_size=microbatch_size)
    with pytest.raises(PrivacyError, match=r"got steps of \[\] on a batch and of \[0\] on one sample"):
        make_trainer(strategy, tmp_path).fit(SkippingByHand(), loader)
    assert strategy.ledger.num_steps == 0


@pytest.mark.parametrize("count", ["batch_idx", "global_step", "own"])
def test_a_manual_step_that_hangs_on_public_counts_is_free(tmp_path: Path, count: str) -> None:
    """Two private optimizers in turn: the trial on single samples must see the counts, and leave the gradients, of its batch."""
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
            left.append(sum(p.grad is not None for p in self.parameters()))

    strategy = rdp()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    trainer.fit(InTurn(), make_loader())
    assert (strategy.ledger.num_steps, trainer.global_step, left) == (8, 8, [2] * 8)


def test_accumulation_may_not_change_during_the_run(tmp_path: Path) -> None:
    """Parts of several logical batches would be summed: one sample may be in each."""

    class Growing(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.accumulate_grad_batches = 1 + trainer.current_epoch

    strategy = rdp()
    with pytest.raises(PrivacyError, match="accumulate_grad_batches=1 as when the data was set up, got 2"):
        make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[Growing()]).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 4


@pytest.mark.parametrize("weight", [0.5, 0.7])
@pytest.mark.parametrize("repeat", range(4))
def test_mixing_after_the_transfer_is_always_found(tmp_path: Path, weight: float, repeat: int) -> None:
    class Mixing(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.trainer.training:
                return batch
            features, labels = batch
            return [weight * features + (1 - weight) * features[torch.randperm(len(features))], labels]

    torch.manual_seed(repeat)
    with pytest.raises(PrivacyError, match="network"):
        make_trainer(rdp(), tmp_path).fit(Mixing(), make_loader())


def test_mixup_with_numpys_draws_is_found(tmp_path: Path) -> None:
    class Mixup(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features, labels = batch
            share = np.random.beta(0.2, 0.2)  # noqa: NPY002
            return nn.functional.cross_entropy(
                self(share * features + (1 - share) * features[torch.randperm(len(features))]), labels
            )

    with pytest.raises(PrivacyError, match="network"):
        make_trainer(rdp(), tmp_path).fit(Mixup(), make_loader())


def test_sorted_data_does_not_hide_a_class_weighted_mean(tmp_path: Path) -> None:
    class Weighted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 25.0]))

    features, labels = make_dataset().tensors
    order = labels.argsort()
    loader = DataLoader(TensorDataset(features[order], labels[order]), batch_size=16)
    with pytest.raises(PrivacyError, match="network"):
        make_trainer(rdp(), tmp_path).fit(Weighted(), loader)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_batch_norm_switched_to_training_later_is_refused(tmp_path: Path) -> None:
    class Thawing(Classifier):
        def on_train_start(self) -> None:
            self.network[1].eval()

        def on_train_epoch_start(self) -> None:
            self.network[1].train(self.current_epoch > 0)

    network = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, NUM_CLASSES))
    network[1].eval()
    strategy = rdp()
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        make_trainer(strategy, tmp_path, max_epochs=2).fit(Thawing(network), make_loader())
    assert strategy.ledger.num_steps == 4


# ---------------------------------------------------------------- public optimizers


class Critic(GAN):
    """Its "public" generator steps every fourth batch, and on the data."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        if (batch_idx + 1) % 4 == 0:
            self.toggle_optimizer(generator)
            generator.zero_grad()
            self.manual_backward(self.generator(batch[0][:, :2]).square().mean())
            generator.step()
            self.untoggle_optimizer(generator)
        discriminator.zero_grad()
        self.manual_backward(self.discriminator(batch[0]).mean())
        discriminator.step()


def test_a_public_optimizer_that_steps_late_is_still_checked(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="changes with which samples"):
        make_trainer(rdp(public_optimizers=[0]), tmp_path).fit(Critic(), make_loader())


def test_a_public_optimizer_never_tried_is_refused(tmp_path: Path) -> None:
    class Whimsical(Critic):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            on_trial = self.trainer.strategy._probe is not None
            super().training_step(batch, 0 if on_trial else 3)

    with pytest.raises(PrivacyError, match="trial did not step it"):
        make_trainer(rdp(public_optimizers=[0]), tmp_path).fit(Whimsical(), make_loader())


@pytest.mark.parametrize("microbatch_size", [None, 4, 1])
def test_gans_in_the_usual_order(tmp_path: Path, microbatch_size: int | None) -> None:
    """The discriminator first, with fakes for each real; then the generator on a fixed number of its own."""

    class Usual(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            real, _ = batch
            generator, discriminator = self.optimizers()
            fake = self.generator(torch.randn(len(real), 2)).detach()
            discriminator.zero_grad()
            self.manual_backward(self.discriminator(fake).mean() - self.discriminator(real).mean())
            discriminator.step()
            self.toggle_optimizer(generator)
            generator.zero_grad()
            self.manual_backward(-self.discriminator(self.generator(torch.randn(4, 2))).mean())
            generator.step()
            self.untoggle_optimizer(generator)

    strategy = rdp(public_optimizers=[0], microbatch_size=microbatch_size)
    trainer = make_trainer(strategy, tmp_path)
    trainer.fit(Usual(), make_loader())
    assert (strategy.ledger.num_steps, trainer.global_step) == (4, 8)


# ---------------------------------------------------------------- epsilon


def test_a_reloaded_loader_with_another_batch_size_is_accounted_as_such(tmp_path: Path) -> None:
    class Growing(Classifier):
        def train_dataloader(self) -> DataLoader:
            return make_loader(batch_size=16 if self.trainer.current_epoch == 0 else 32)

    strategy = rdp()
    make_trainer(strategy, tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1).fit(Growing())
    assert [(run.num_steps, run.event.sample_rate) for run in strategy.ledger.entries] == [(4, 0.25), (2, 0.5)]
    assert strategy.plan.expected_batch_size == 32


def test_a_search_for_the_batch_size_is_accounted_and_refused_under_a_target(tmp_path: Path) -> None:
    class Sized(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"batch_size": 2})

        def train_dataloader(self) -> DataLoader:
            return make_loader(batch_size=self.hparams.batch_size)

    finder = {"mode": "power", "steps_per_trial": 2, "max_trials": 2, "init_val": 2}
    strategy = rdp()
    make_trainer(strategy, tmp_path, callbacks=[BatchSizeFinder(**finder)]).fit(Sized(), val_dataloaders=make_loader())
    final = strategy.ledger.entries[-1].event.sample_rate
    assert final == strategy.plan.expected_batch_size / 64
    assert len({run.event.sample_rate for run in strategy.ledger.entries}) > 1
    with pytest.raises(ValueError, match="a search for it"):
        make_trainer(DPStrategy(target_epsilon=1.0), tmp_path, callbacks=[BatchSizeFinder(**finder)]).fit(Sized())


@pytest.mark.parametrize("later", [8, 64])
def test_a_target_holds_after_a_resume_with_another_batch_size(tmp_path: Path, later: int) -> None:
    def target() -> DPStrategy:
        return DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant="rdp")

    class Stopping(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")
                trainer.should_stop = True

    make_trainer(target(), tmp_path, max_epochs=4, callbacks=[Stopping()]).fit(Classifier(), make_loader())
    strategy = target()
    trainer = make_trainer(strategy, tmp_path, max_epochs=4)
    trainer.fit(Classifier(), make_loader(batch_size=later), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert strategy.ledger.num_steps == strategy.plan.steps == 8 + 2 * 64 // later
    assert 1.98 <= strategy.epsilon() <= 2.0


def test_a_target_refuses_steps_beyond_the_plan(tmp_path: Path) -> None:
    class Extending(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.fit_loop.max_epochs = 3

    strategy = DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant="rdp")
    with pytest.raises(PrivacyError, match="at most the 4 planned steps"):
        make_trainer(strategy, tmp_path, callbacks=[Extending()]).fit(Classifier(), make_loader())
    assert strategy.epsilon() <= 2.0


def test_shuffled_passes_cut_short_are_planned_one_by_one(tmp_path: Path) -> None:
    strategy = DPStrategy(target_epsilon=3.0, target_delta=1e-3, sampling="shuffle")
    trainer = make_trainer(strategy, tmp_path, max_epochs=6, limit_train_batches=2)
    trainer.fit(Classifier(), make_loader())
    assert sum(run.num_passes for run in strategy.ledger.entries) == 6
    assert 2.97 <= strategy.epsilon() <= 3.0
    budget = rdp(sampling="shuffle", noise_multiplier=3.0)
    make_trainer(budget, tmp_path, max_epochs=6, limit_train_batches=2, callbacks=[PrivacyBudget(2.0)]).fit(
        Classifier(), make_loader()
    )
    assert 0 < budget.epsilon() <= 2.0


@pytest.mark.parametrize("callbacks", [[], [PrivacyBudget(50.0)]])
def test_unplanned_steps_on_one_batch_are_refused_where_a_limit_was_promised(
    tmp_path: Path, callbacks: list[Any]
) -> None:
    class Thrice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(3):
                super().training_step(batch, batch_idx)

    strategy = rdp() if callbacks else DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant="rdp")
    with pytest.raises(PrivacyError, match="to step once a batch"):
        make_trainer(strategy, tmp_path, callbacks=callbacks).fit(Thrice(), make_loader())


def test_two_planned_optimizers_meet_a_target_exactly(tmp_path: Path) -> None:
    strategy = DPStrategy(target_epsilon=2.0, target_delta=1e-3, accountant="rdp")
    make_trainer(strategy, tmp_path, max_epochs=2).fit(TwoOptimizers(), make_loader())
    assert 1.98 <= strategy.epsilon() <= 2.0
    assert strategy.ledger.entries[0].event.noise_multiplier == strategy.plan.noise_multiplier


def test_a_budget_binds_in_a_learning_rate_search(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.record(PrivacyEvent(kind="poisson", noise_multiplier=1.3, sample_rate=0.25), 10)
    budget = make_accountant("rdp").epsilon(ledger, 1e-3)
    strategy = rdp()
    finder = LearningRateFinder(num_training_steps=40, update_attr=False, attr_name="lr")
    with pytest.raises(PrivacyError, match="stop after 10 steps"):
        make_trainer(strategy, tmp_path, max_epochs=20, callbacks=[PrivacyBudget(budget), finder]).fit(
            Classifier(), make_loader()
        )
    assert strategy.ledger.num_steps == 10
    assert strategy.last_allowed_step is None


def test_a_list_of_one_loader_is_refused_by_name(tmp_path: Path) -> None:
    for nested in ([make_loader()], {"a": make_loader()}):
        with pytest.raises(ValueError, match="inside a"):
            make_trainer(rdp(), tmp_path).fit(Classifier(), nested)


def test_hooks_see_a_batch_of_length_zero_when_nothing_was_drawn(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Unpacking(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            features, labels = batch
            assert features.shape[1:] == (NUM_FEATURES,)
            sizes.append(len(labels))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("size", float(len(batch[0])), on_step=False, on_epoch=True, batch_size=1)

    make_trainer(rdp(), tmp_path).fit(Unpacking(), make_loader(batch_size=1))
    assert 0 in sizes


def test_losses_a_sample_under_a_sum(tmp_path: Path) -> None:
    class Losses(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    seen = []
    for reduction in ("mean", "sum"):
        recorder = Recorder()
        strategy = rdp(noise_multiplier=0.0, loss_reduction=reduction)
        make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(Losses(lr=0.0), make_loader(batch_size=64))
        seen.append(recorder.before_step[0])
    torch.testing.assert_close(*seen)
