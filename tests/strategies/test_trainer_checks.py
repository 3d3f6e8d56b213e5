"""Bad input: each is refused before any data is touched, by the name the user wrote."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from lightning_dp import DPDDPStrategy, DPStrategy, FlatClipping, PrivacyError
from tests.cases import each
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer


class Untouchable(torch.utils.data.Dataset):
    """Fails when a record is read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a record was read")


@each("strategy", [DPStrategy, DPDDPStrategy])
@each(
    "arguments, error, message",
    [
        ({}, ValueError, "exactly one of noise_multiplier and target_epsilon"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0}, ValueError, "exactly one of"),
        ({"noise_multiplier": math.nan}, ValueError, "0 <= noise_multiplier < inf, got noise_multiplier=nan"),
        ({"noise_multiplier": -1.0}, ValueError, "0 <= noise_multiplier < inf"),
        ({"noise_multiplier": math.inf}, ValueError, "0 <= noise_multiplier < inf"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier to be a number"),
        ({"noise_multiplier": True}, TypeError, "noise_multiplier to be a number"),
        ({"target_epsilon": 0.0}, ValueError, "0 < target_epsilon < inf"),
        ({"target_epsilon": math.nan}, ValueError, "0 < target_epsilon < inf"),
        ({"target_epsilon": math.inf}, ValueError, "0 < target_epsilon < inf"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, ValueError, "0 < target_delta < 1"),
        ({"noise_multiplier": 1.0, "target_delta": 0.0}, ValueError, "0 < target_delta < 1"),
        ({"noise_multiplier": 1.0, "target_delta": math.nan}, ValueError, "0 < target_delta < 1"),
        ({"noise_multiplier": 1.0, "target_delta": -1e-5}, ValueError, "0 < target_delta < 1"),
        ({"noise_multiplier": 1.0, "max_grad_norm": -1.0}, ValueError, "0 < max_grad_norm < inf"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.inf}, ValueError, "0 < max_grad_norm < inf"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, ValueError, "0 < max_grad_norm < inf"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.nan}, ValueError, "0 < max_grad_norm < inf"),
        ({"noise_multiplier": 1.0, "clipping": "soft"}, ValueError, "flat"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, ValueError, "pld"),
        ({"noise_multiplier": 1.0, "sampling": "uniform"}, ValueError, "'poisson', 'shuffle'"),
        ({"noise_multiplier": 1.0, "microbatch_size": 0}, ValueError, "microbatch_size >= 1"),
        ({"noise_multiplier": 1.0, "microbatch_size": 2.0}, TypeError, "microbatch_size to be a whole number"),
        ({"noise_multiplier": 1.0, "grad_sample": "ghost"}, ValueError, "'auto', 'rules', 'single', 'materialize'"),
        ({"noise_multiplier": 1.0, "memory": "tiny"}, ValueError, "'fast', 'lean'"),
        ({"noise_multiplier": 1.0, "neighboring_relation": "swap"}, ValueError, "neighboring_relation"),
        ({"noise_multiplier": 1.0, "check_per_sample": 1}, TypeError, "check_per_sample to be True or False"),
        ({"noise_multiplier": 1.0, "seed": -1}, ValueError, "seed to be a whole number"),
        ({"noise_multiplier": 1.0, "seed": 1, "secure_rng": True}, ValueError, "secure_rng=True without a seed"),
        ({"noise_multiplier": 1.0, "public_optimizers": 0}, TypeError, "a list of positions, got public_optimizers=0"),
        ({"noise_multipler": 1.0}, TypeError, "got noise_multipler=1.0. Did you mean noise_multiplier"),
        ({"noise_multiplier": 1.0, "public_optimizers": [-1]}, ValueError, "public_optimizers"),
        ({"target_epsilon": 1.0, "clipping": "none"}, ValueError, "epsilon is infinite"),
        (
            {"noise_multiplier": 1.0, "max_grad_norm": 2.0, "clipping": FlatClipping(0.5)},
            ValueError,
            r"got max_grad_norm=2\.0 with clipping=FlatClipping\(max_grad_norm=0\.5\)",
        ),
    ],
)
def test_constructor_arguments(strategy: type, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        strategy(**arguments)


def test_an_accountant_without_a_bound_is_refused_at_once(tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, accountant="gdp")
    with pytest.raises(ValueError, match=r'Expected releases without sampling for accountant=.gdp.*accountant="pld"'):
        make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())
    assert strategy.ledger.num_steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugins": [MixedPrecision("16-mixed", "cpu")]}, r"precision='16-mixed'.*bf16-mixed"),
        ({"precision": "16-true"}, r"precision='16-true'.*overflow.*'bf16-true'"),
        ({"overfit_batches": 0.1}, r"at least one batch to overfit on, got overfit_batches=0.1 of 4 batches"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 3: 5})]}, r"got 80 \(batch_size=16 x"),
    ],
)
def test_trainer_flags(tmp_path: Any, options: dict[str, Any], message: str) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(Classifier(), DataLoader(Untouchable(), batch_size=16))


def test_several_devices_name_the_other_strategy(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="use DPDDPStrategy"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, devices=2)
    with pytest.raises(ValueError, match="use DPDDPStrategy"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, num_nodes=2)


def test_batch_norm_is_named_and_fix_is_offered(tmp_path: Any) -> None:
    network = nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, NUM_CLASSES))
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path)
    with pytest.raises(PrivacyError, match=r"network\.1 \(BatchNorm1d\).*lightning_dp\.fix"):
        trainer.fit(Classifier(network), DataLoader(Untouchable(), batch_size=16))


def test_no_trainable_parameters(tmp_path: Any) -> None:
    module = Classifier()
    module.network.requires_grad_(False)
    with pytest.raises(ValueError, match="to have trainable parameters"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(module, make_loader())


class ClippedByHook(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, **options: Any) -> None:
        assert all(p.grad is not None for p in self.parameters())
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("way", ["gradient_clip_val=0.01", "configure_gradient_clipping"])
def test_clipping_acts_on_the_private_gradient_and_says_so(
    way: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    by_trainer = way.startswith("gradient_clip_val")
    module = Classifier(lr=1.0) if by_trainer else ClippedByHook(lr=1.0)
    before = torch.cat([p.detach().clone().flatten() for p in module.parameters()])
    recorder, options = Recorder(), {"gradient_clip_val": 0.01} if by_trainer else {}
    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=5)
    with caplog.at_level(logging.INFO):
        make_trainer(strategy, tmp_path, max_steps=1, callbacks=[recorder], **options).fit(module, make_loader())
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-4)
    private = torch.cat([g.flatten() for g in recorder.before_step[0].values()])
    assert float(private.norm()) > 0.05  # the hook before the step sees it whole, and noised
    torch.testing.assert_close((before - after) / 0.01, private / private.norm(), rtol=1e-3, atol=1e-5)
    (said,) = [r.getMessage() for r in caplog.records if "acts on the private gradient" in r.getMessage()]
    assert said.startswith(way)


class Thawing(BaseFinetuning):
    """Freezes the whole module in ``setup`` and thaws it in an epoch."""

    def __init__(self, at_epoch: int) -> None:
        super().__init__()
        self.at_epoch = at_epoch

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[0] if self.at_epoch else pl_module)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.at_epoch:
            self.make_trainable(pl_module)
            if epoch:
                optimizer.add_param_group({"params": list(pl_module.network[0].parameters())})


class OverTrainable(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad] or self.parameters(), lr=0.0)


@pytest.mark.parametrize("at_epoch", [0, 1])
@pytest.mark.one_in(2)
def test_layers_thawed_by_a_callback_are_noised_from_then_on(at_epoch: int, tmp_path: Any) -> None:
    recorder, strategy = Recorder(), DPStrategy(noise_multiplier=1.0)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[Thawing(at_epoch), recorder])
    trainer.fit(OverTrainable(), make_loader())
    thawed = recorder.before_step[4 * at_epoch :]
    assert ["network.0.weight" in seen for seen in recorder.before_step] == [False] * (8 - len(thawed)) + [True] * len(
        thawed
    )
    assert all(float(seen["network.0.weight"].abs().min()) > 0 for seen in thawed)
    assert strategy.ledger.num_steps == 8


class ThawsBeforeABatch(L.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.network[0].requires_grad_(trainer.global_step >= 2)


def test_a_layer_thawed_before_a_batch_is_noised_from_then_on(tmp_path: Any) -> None:
    recorder, module = Recorder(), Classifier()
    module.network[0].requires_grad_(False)
    callbacks = [ThawsBeforeABatch(), recorder]
    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=callbacks).fit(module, make_loader())
    assert ["network.0.weight" in seen for seen in recorder.before_step] == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning")
def test_layers_are_judged_in_the_mode_in_which_training_starts(tmp_path: Any) -> None:
    class Evaluated(Classifier):
        def on_fit_start(self) -> None:
            self.network[1].requires_grad_(False).eval()

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, NUM_CLASSES))

    module = Evaluated(network())
    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(module, make_loader())
    assert int(module.network[1].num_batches_tracked) == 0

    class Thawed(Evaluated):
        def on_train_epoch_start(self) -> None:
            self.network[1].requires_grad_(self.current_epoch > 0)

    with pytest.raises(PrivacyError, match="BatchNorm1d normalises with statistics of the batch when it trains"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, max_epochs=2).fit(Thawed(network()), make_loader())


def test_optimizer_parameters_that_are_not_the_modules(tmp_path: Any) -> None:
    class Moved(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.ones(7))], lr=0.1)

    with pytest.raises(ValueError, match=r"one of shape \(7,\) at position 4"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Moved(), DataLoader(Untouchable(), batch_size=16))


def test_lbfgs_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="got LBFGS"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(
            Classifier(optimizer=torch.optim.LBFGS), DataLoader(Untouchable(), batch_size=16)
        )


def test_batch_larger_than_the_dataset(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"65.*64|64.*65"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(
            Classifier(), DataLoader(Untouchable(), batch_size=65)
        )


def test_weighted_sampling_is_refused(tmp_path: Any) -> None:
    loader = DataLoader(Untouchable(), batch_size=16, sampler=WeightedRandomSampler(torch.ones(64), 64))
    with pytest.raises((ValueError, TypeError), match="WeightedRandomSampler"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Classifier(), loader)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(make_dataset())


def test_stream_is_refused_under_poisson_and_trains_shuffled(tmp_path: Any) -> None:
    with pytest.raises((ValueError, TypeError), match='sampling="shuffle"'):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Classifier(), DataLoader(Stream(), batch_size=16))
    adding = DPStrategy(noise_multiplier=3.0, sampling="shuffle", target_delta=1e-3)
    with pytest.raises(ValueError, match="shifts all later batches"):
        make_trainer(adding, tmp_path).fit(Classifier(), DataLoader(Stream(), batch_size=16))
    strategy = DPStrategy(noise_multiplier=3.0, sampling="shuffle", target_delta=1e-3, neighboring_relation="zero_out")
    make_trainer(strategy, tmp_path, max_epochs=2).fit(Classifier(), DataLoader(Stream(), batch_size=16))
    assert strategy.ledger.num_steps == 8
    assert sum(run.num_passes for run in strategy.ledger.entries) == 2


def test_unbounded_run_with_a_target(tmp_path: Any) -> None:
    trainer = make_trainer(DPStrategy(target_epsilon=1.0), tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"max_epochs=-1"):
        trainer.fit(Classifier(), DataLoader(Untouchable(), batch_size=16))


def test_a_meaningless_delta_warns(tmp_path: Any) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, target_delta=0.02), tmp_path)
    with pytest.warns(UserWarning, match="meaningless for 64 records"):
        trainer.fit(Classifier(), make_loader())
