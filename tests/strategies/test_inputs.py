"""Module and training data as users give them: layers exchanged in time, loaders of every shape that can be private."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_dp import DPStrategy, FixModule, NoiseScheduler, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, NUM_CLASSES))


class BornInFit(Classifier):
    """Makes its layers in a hook of the fit, as packages do that see the data first."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.network, self.hook = nn.Linear(1, 1), hook

    def make(self, hook: str) -> None:
        if hook == self.hook:
            self.network = network()

    def setup(self, stage: str) -> None:
        self.make("setup")

    def configure_model(self) -> None:
        self.make("configure_model")


# ---------------------------------------------------------------- layers that cannot be private


@pytest.mark.parametrize("hook", ["__init__", "setup", "configure_model"])
@pytest.mark.one_in(3)
def test_fix_reaches_layers_wherever_they_are_made(hook: str, tmp_path: Any) -> None:
    module = Classifier(network()) if hook == "__init__" else BornInFit(hook)
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path)
    trainer.fit(module, make_loader())
    assert type(module.network[1]) is nn.GroupNorm
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}


def test_fix_module_exchanges_layers_before_optimizers_are_made(tmp_path: Any) -> None:
    module, callback = Classifier(network()), FixModule()
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=[callback])
    trainer.fit(module, make_loader())
    assert type(module.network[1]) is nn.GroupNorm
    assert callback.changes[0].startswith("network.1: BatchNorm1d became GroupNorm")
    assert any(p is module.network[1].weight for p in trainer.optimizers[0].param_groups[0]["params"])


class Activated(nn.BatchNorm1d):
    """A batch norm with an activation behind it, written out."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps).tanh()


@pytest.mark.slow
def test_a_fixed_subclass_trains_as_group_norm_does(tmp_path: Any) -> None:
    def network(*norm: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(NUM_FEATURES, 32), *norm, nn.Linear(32, NUM_CLASSES))

    one, other = Classifier(network(Activated(32))), Classifier(network(nn.GroupNorm(2, 32), nn.Tanh()))
    for module in (one, other):
        strategy = DPStrategy(noise_multiplier=0.5, seed=2, fix=True)
        make_trainer(strategy, tmp_path).fit(module, make_loader())
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_a_fixed_run_resumes_and_is_tested_from_its_checkpoint(tmp_path: Any) -> None:
    first = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path)
    first.fit(Classifier(network()), make_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path, max_epochs=2)
    again = Classifier(network())
    second.fit(again, make_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert second.strategy.ledger.num_steps == 2 * first.strategy.ledger.num_steps
    tested = Classifier(network())
    second.test(tested, make_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert type(tested.network[1]) is nn.GroupNorm
    torch.testing.assert_close(tested.network[1].weight, first.lightning_module.network[1].weight)


def test_fix_is_offered_only_where_it_changes_something(tmp_path: Any) -> None:
    class Counted(Classifier):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(nn.Sequential(nn.Linear(NUM_FEATURES, 16), *layers, nn.Linear(16, NUM_CLASSES)))
            self.words = nn.Embedding(4, 2, max_norm=1.0)

    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path)
    with pytest.raises(PrivacyError, match="leave max_norm out") as error:
        trainer.fit(Counted(), make_loader())
    assert "fix" not in str(error.value)
    with pytest.raises(PrivacyError, match=r"`DPStrategy\(fix=True\)`, replaces 1 of these 2"):
        trainer.fit(Counted(nn.BatchNorm1d(16)), make_loader())


def test_fix_is_a_flag() -> None:
    with pytest.raises(TypeError, match="fix to be True or False, got fix=1"):
        DPStrategy(noise_multiplier=1.0, fix=1)  # type: ignore[arg-type]


# ---------------------------------------------------------------- loaders of every shape


class Structured(Classifier):
    """Takes its batch out of whatever the loaders' structure is."""

    def __init__(self, take: Any, loaders: Any = None) -> None:
        super().__init__(lr=0.0)
        self.take, self.loaders = take, loaders

    def train_dataloader(self) -> Any:
        return self.loaders()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.take(batch), batch_idx)


def in_bulk() -> DataLoader[Any]:
    dataset = make_dataset()
    return DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), 16, False), batch_size=None)


def apart() -> dict[str, DataLoader[Any]]:
    features, labels = make_dataset().tensors
    return {
        "x": DataLoader(features, batch_size=16, shuffle=True),
        "y": DataLoader(labels, batch_size=16, shuffle=True),
    }


SHAPES: dict[str, tuple[Any, Any]] = {
    "bulk": (in_bulk, lambda batch: batch),
    "a list": (lambda: [make_loader()], lambda batch: batch[0]),
    "a dictionary": (lambda: {"train": make_loader()}, lambda batch: batch["train"]),
    "parts": (apart, lambda batch: (batch["x"], batch["y"])),
    "combined": (lambda: CombinedLoader(apart(), "min_size"), lambda batch: (batch["x"], batch["y"])),
}


@pytest.mark.parametrize("by_hook", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.one_in(4)
def test_loaders_of_every_shape_give_the_same_gradients(shape: str, by_hook: bool, tmp_path: Any) -> None:
    """Under one seed the same records are drawn as from a plain loader, and released as they are."""
    make, take = SHAPES[shape]
    seen = []
    for module, loaders in (
        (Classifier(lr=0.0), make_loader()),
        (Structured(take, make), None if by_hook else make()),
    ):
        checked = by_hook and loaders is None  # each shape once
        recorder = Recorder()
        strategy = DPStrategy(noise_multiplier=0.5, seed=4, microbatch_size=5, check_per_sample=checked)
        trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
        trainer.fit(module, loaders)
        assert strategy.ledger.num_steps == 4
        assert strategy.ledger.entries[0].event.sample_rate == 0.25
        assert "dataloader" not in trainer.fit_loop._data_source.__dict__
        seen.append(recorder.before_step)
    for plain, shaped in zip(*seen, strict=True):
        torch.testing.assert_close(plain, shaped)


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`:UserWarning")
def test_batches_of_an_iterable_are_streamed(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, sampling="shuffle", neighboring_relation="zero_out")
    module = Structured(lambda batch: batch, lambda: Twice(list(make_loader())))
    make_trainer(strategy, tmp_path, max_epochs=2).fit(module)
    assert strategy.ledger.num_steps == 8
    assert sum(run.num_passes for run in strategy.ledger.entries) == 2


class Twice:
    """Batches that can be read again."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.mark.parametrize(("overfit", "records", "steps"), [(0.5, 32, 2), (0.3, 16, 1), (1.0, 64, 4), (2, 32, 2)])
@pytest.mark.one_in(4)
def test_overfit_batches_keep_a_share_of_the_records(overfit: Any, records: int, steps: int, tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, overfit_batches=overfit)
    trainer.fit(Classifier(), DataLoader(make_dataset(), batch_size=16))
    assert strategy.plan.dataset_size == records
    assert strategy.ledger.num_steps == strategy.plan.steps == 2 * steps
    assert strategy.ledger.entries[0].event.sample_rate == 16 / records
    assert trainer.limit_train_batches == overfit


# ---------------------------------------------------------------- accumulation that changes with the epoch


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.one_in(2)
def test_a_change_of_accumulation_changes_the_sample_rate(microbatch_size: int | None, tmp_path: Any) -> None:
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=1e3, microbatch_size=microbatch_size)
    callbacks = [GradientAccumulationScheduler({1: 2, 3: 4}), recorder]
    trainer = make_trainer(strategy, tmp_path, max_epochs=4, callbacks=callbacks)
    trainer.fit(Classifier(lr=0.0), make_loader())
    rates = [(run.event.sample_rate, run.num_steps) for run in strategy.ledger.entries]
    assert rates == [(0.25, 4), (0.5, 4), (1.0, 1)]
    # with every record in the batch the gradient is that of the whole data, divided by the batch size of that epoch
    features, labels = make_dataset().tensors
    module = Classifier(lr=0.0)
    nn.functional.cross_entropy(module(features), labels).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(recorder.before_step[-1][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_target_is_kept_when_the_accumulation_changes(tmp_path: Any) -> None:
    strategy = DPStrategy(target_epsilon=2.0, target_delta=1e-3)
    callbacks = [GradientAccumulationScheduler({1: 2, 2: 1})]
    make_trainer(strategy, tmp_path, max_epochs=3, callbacks=callbacks).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 4 + 2 + 4
    assert 1.9 < strategy.epsilon() <= 2.0
    noises = {run.event.noise_multiplier for run in strategy.ledger.entries}
    assert len(noises) > 1


def test_schedules_by_epochs_of_different_lengths_are_refused(tmp_path: Any) -> None:
    callbacks = [GradientAccumulationScheduler({1: 2}), NoiseScheduler("step", factor=0.5)]
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match="Expected epochs of equal length with interval='epoch', got Gradient"):
        trainer.fit(Classifier(), make_loader())


@pytest.mark.slow
def test_a_run_resumes_in_an_epoch_of_another_accumulation(tmp_path: Any) -> None:
    def trainer(max_epochs: int) -> Any:
        callbacks = [GradientAccumulationScheduler({1: 2})]
        return make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, max_epochs=max_epochs, callbacks=callbacks)

    first = trainer(2)
    first.fit(Classifier(), make_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(3)
    second.fit(Classifier(), make_loader(), ckpt_path=tmp_path / "a.ckpt")
    rates = [(run.event.sample_rate, run.num_steps) for run in second.strategy.ledger.entries]
    assert rates == [(0.25, 4), (0.5, 4)]
