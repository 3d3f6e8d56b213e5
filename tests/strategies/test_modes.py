"""The ways a Trainer can run: limits, precisions, optimizers, schedulers, tuner, workers, evaluation."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp import DPStrategy, schedules
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer


def strategy_of(**options: Any) -> DPStrategy:
    """Without the checks of samples, unless asked for: most of these tests have another subject."""
    return DPStrategy(**{"noise_multiplier": 1.3, "target_delta": 1e-3, "check_per_sample": False, **options})


def targeted() -> DPStrategy:
    """Calibrated; without the checks of samples, which the noise does not depend on."""
    return DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 2, "limit_train_batches": 3}, 4),
        ({"fast_dev_run": True}, 1),
        ({"max_epochs": 2, "overfit_batches": 2}, 4),
    ],
)
@pytest.mark.one_in(3)
def test_limits_and_the_plan_agree(tmp_path: Any, options: dict[str, Any], steps: int) -> None:
    """What was planned is what was taken, one ledger entry an optimizer step; epsilon ends within 1 % of the target."""
    strategy = targeted()
    trainer = make_trainer(strategy, tmp_path, **options)
    trainer.fit(Classifier(), make_loader())
    assert strategy.plan.steps == strategy.ledger.num_steps == trainer.global_step == steps
    assert 1.98 <= strategy.epsilon() <= 2.0


@pytest.mark.parametrize(("accumulate", "rate"), [(1, 0.25), (2, 0.5)])
@pytest.mark.one_in(2)
def test_accumulation_enlarges_the_logical_batch(tmp_path: Any, accumulate: int, rate: float) -> None:
    strategy = strategy_of()
    trainer = make_trainer(strategy, tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(Classifier(), make_loader())
    assert strategy.plan.expected_batch_size == 16 * accumulate
    assert strategy.ledger.entries[0].event.sample_rate == rate
    assert trainer.num_training_batches == 4


def test_overfitting_speaks_of_the_records_it_keeps(tmp_path: Any) -> None:
    strategy = strategy_of()
    make_trainer(strategy, tmp_path, overfit_batches=2).fit(Classifier(), make_loader())
    assert (strategy.plan.dataset_size, strategy.plan.sample_rate) == (32, 0.5)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.one_in(4)
def test_precisions(tmp_path: Any, precision: str, dtype: torch.dtype, microbatch_size: int | None) -> None:
    """The clipped sum of a whole pass agrees with float64, to the precision's own resolution."""
    found = []
    for chosen in ("64-true", precision):
        recorder = Recorder()
        strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=0.5, microbatch_size=microbatch_size)
        trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], precision=chosen)
        trainer.fit(Classifier(lr=0.0), make_loader(batch_size=64))
        found.append(recorder.before_step[0])
    reference, seen = found
    for name, gradient in seen.items():
        assert gradient.dtype == dtype
        tolerance = 3e-2 if "bf16" in precision else 1e-5
        torch.testing.assert_close(
            gradient.double(), reference[name], rtol=tolerance, atol=tolerance * float(reference[name].abs().max())
        )


def test_the_users_own_autocast_trains(tmp_path: Any) -> None:
    strategy, module = DPStrategy(noise_multiplier=1.0), Classifier()
    module.network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(module.network.forward)
    make_trainer(strategy, tmp_path).fit(module, make_loader())
    assert strategy.ledger.num_steps == 4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.one_in(3)
def test_optimizers_and_a_step_scheduler(tmp_path: Any, optimizer: Any) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            chosen = super().configure_optimizers()
            total = self.trainer.estimated_stepping_batches
            assert total == 8
            scheduler = torch.optim.lr_scheduler.LinearLR(chosen, 1.0, 0.0, total_iters=total)
            return {"optimizer": chosen, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    strategy = strategy_of()
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    trainer.fit(Scheduled(optimizer=optimizer), make_loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    assert strategy.ledger.num_steps == 8


def test_a_schedule_of_the_noise_is_calibrated_and_recorded(tmp_path: Any) -> None:
    strategy = targeted()
    strategy.mechanisms.add("a test", noise_schedule=lambda run: schedules.step(factor=0.8, every=4))
    recorder = Recorder()
    make_trainer(strategy, tmp_path, max_epochs=3, callbacks=[recorder]).fit(Classifier(), make_loader())
    sigma = strategy.plan.noise_multiplier
    assert [(run.num_steps, run.event.noise_multiplier) for run in strategy.ledger.entries] == [
        (4, pytest.approx(sigma * factor)) for factor in (1.0, 0.8, 0.64)
    ]
    assert 1.98 <= strategy.epsilon() <= 2.0


def test_print_of_the_module_shows_each_batch_once(tmp_path: Any, capsys: Any) -> None:
    class Printing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.print(f"batch {batch_idx}")
            return super().training_step(batch, batch_idx)

    make_trainer(strategy_of(microbatch_size=5), tmp_path).fit(Printing(), make_loader())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert said == [f"batch {i}" for i in range(4)]


def test_a_trainer_that_has_fitted_can_be_pickled(tmp_path: Any) -> None:
    strategy = strategy_of()
    trainer = make_trainer(strategy, tmp_path)
    trainer.fit(Classifier(), make_loader())
    copied = pickle.loads(pickle.dumps(trainer)).strategy
    assert copied.ledger.num_steps == strategy.ledger.num_steps == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when its compiler is imported
def test_a_compiled_module_trains_as_the_eager_one(tmp_path: Any, caplog: Any) -> None:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    caplog.set_level(logging.INFO)
    trained = []
    for change in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        module = Logging()
        trainer = make_trainer(DPStrategy(noise_multiplier=0.0, seed=0, sampling="shuffle"), tmp_path)
        trainer.fit(change(module), make_loader())
        assert "loss" in trainer.callback_metrics
        trained.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    torch.testing.assert_close(*trained)
    assert not torch.equal(trained[0], torch.cat([p.detach().flatten() for p in Classifier().parameters()]))
    assert "Compiled modules and functions run eagerly (the module itself)" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.one_in(2)
def test_workers_microbatches_and_options_of_the_loader(tmp_path: Any, num_workers: int) -> None:
    strategy = strategy_of(microbatch_size=5, check_per_sample=True)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    loader = make_loader(num_workers=num_workers, persistent_workers=num_workers > 0)
    trainer.fit(Classifier(), loader)
    assert strategy.ledger.num_steps == 8
    assert (trainer.train_dataloader.num_workers, trainer.train_dataloader.persistent_workers) == (
        num_workers,
        num_workers > 0,
    )
    assert trainer.train_dataloader.dataset is loader.dataset


def test_results_do_not_depend_on_the_microbatch_size(tmp_path: Any) -> None:
    ends = []
    for microbatch_size in (None, 7, 2, 1):
        strategy = strategy_of(seed=7, microbatch_size=microbatch_size)
        module = Classifier()
        make_trainer(strategy, tmp_path, max_epochs=2).fit(module, make_loader())
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-5)


def test_sanity_check_validation_and_prediction(tmp_path: Any) -> None:
    strategy = strategy_of()
    trainer = make_trainer(strategy, tmp_path, num_sanity_val_steps=2)
    module, plain = Classifier(), torch.utils.data.DataLoader(make_dataset(), batch_size=20)
    trainer.fit(module, make_loader(), plain)
    assert "val_loss" in trainer.callback_metrics
    assert len(trainer.predict(module, plain)) == 4
    assert trainer.test(module, plain, verbose=False)
    assert strategy.ledger.num_steps == 4


def test_user_hooks_see_the_users_batch(tmp_path: Any) -> None:
    transferred: list[int] = []

    class Hooked(Classifier):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            features, labels = batch
            return [features * 1.0, labels]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            transferred.append(len(batch[0]))
            return batch

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            features, labels = batch
            assert len(features) == len(labels)

    module = Hooked()
    make_trainer(strategy_of(check_per_sample=True), tmp_path).fit(module, make_loader(batch_size=32))
    assert len(transferred) > 2
    assert "_on_before_batch_transfer" not in module.__dict__


def test_layers_unfrozen_later_are_noised_from_then_on(tmp_path: Any) -> None:
    class Unfreezing(Classifier):
        def on_train_epoch_start(self) -> None:
            self.network[0].requires_grad_(self.current_epoch > 0)

    recorder = Recorder()
    module = Unfreezing(lr=0.0)
    module.network[0].requires_grad_(False)
    make_trainer(strategy_of(), tmp_path, max_epochs=2, callbacks=[recorder]).fit(module, make_loader())
    assert ["network.0.weight" in seen for seen in recorder.before_step] == [False] * 4 + [True] * 4
    assert all(float(seen["network.0.weight"].abs().min()) > 0 for seen in recorder.before_step[4:])


def test_unused_parameters_are_noised(tmp_path: Any) -> None:
    class Unused(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    recorder = Recorder()
    make_trainer(strategy_of(), tmp_path, callbacks=[recorder]).fit(Unused(), make_loader())
    assert all(float(seen["spare.weight"].abs().min()) > 0 for seen in recorder.before_step)


def test_the_end_of_fit_states_the_privacy_in_one_line(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    strategy = strategy_of()
    with caplog.at_level(logging.INFO):
        make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Privacy: (epsilon=")]
    for part in (
        "delta=0.001",
        "adding or removing one record",
        "Poisson sampling at rate 0.25",
        "accountant pld",
        "4 steps",
    ):
        assert part in line
    statement = strategy.privacy_statement()
    assert line in statement
    assert "what a training step logs" in statement


def test_epsilon_before_training_says_so() -> None:
    with pytest.raises(ValueError, match="no steps recorded"):
        DPStrategy(noise_multiplier=1.0).epsilon()


@pytest.mark.parametrize("options", [{"noise_multiplier": 0.0}, {"noise_multiplier": 1.0, "clipping": "none"}])
@pytest.mark.one_in(2)
def test_ablations_are_infinite_and_say_so(tmp_path: Any, options: dict[str, Any]) -> None:
    strategy = DPStrategy(**options)
    make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())
    assert strategy.epsilon() == float("inf")
    assert "This run is not private" in strategy.privacy_statement()


def test_the_module_is_left_as_it_was(tmp_path: Any) -> None:
    module = Classifier()
    keys, attributes = list(module.state_dict()), set(module.network[0].__dict__)
    make_trainer(strategy_of(check_per_sample=True), tmp_path).fit(module, make_loader())
    assert list(module.state_dict()) == keys
    assert set(module.network[0].__dict__) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())
    module.network[0](torch.ones(1, 6)).sum().backward()
    assert module.network[0].weight.grad is not None
