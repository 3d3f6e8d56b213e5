"""Save, kill, resume: the ledger survives, is refused when it cannot be trusted, and noise is never reused (I7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dp import DPStrategy, EpsilonMonitor, PrivacyError
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_private_step import clipped_sum


def fit(
    tmp_path: Path,
    *,
    resume: Path | None = None,
    strategy: DPStrategy | None = None,
    callbacks: Any = (),
    **options: Any,
) -> DPStrategy:
    strategy = strategy or DPStrategy(noise_multiplier=1.3, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, callbacks=list(callbacks), **options)
    trainer.fit(Classifier(), make_loader(), ckpt_path=resume, weights_only=True if resume else None)
    return strategy


def save_at(tmp_path: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, **when)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a private run of one epoch."""
    folder = tmp_path_factory.mktemp("saved")
    fit(folder, enable_checkpointing=True, callbacks=[save_at(folder)])
    return folder / "epoch=0-step=4.ckpt"


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run without privacy."""
    folder = tmp_path_factory.mktemp("public")
    plain = make_trainer("auto", folder, max_epochs=1, enable_checkpointing=True, callbacks=[save_at(folder)])
    plain.fit(Classifier(), make_loader())
    return folder / "epoch=0-step=4.ckpt"


@pytest.mark.parametrize(
    ("when", "name"),
    [({"every_n_epochs": 1}, "epoch=1-step=8.ckpt"), ({"every_n_train_steps": 3}, "epoch=1-step=6.ckpt")],
)
@pytest.mark.one_in(2)
def test_resumed_epsilon_equals_the_uninterrupted_runs(tmp_path: Path, when: dict[str, int], name: str) -> None:
    whole = fit(tmp_path / "whole", max_epochs=4)
    fit(tmp_path / "part", max_epochs=2, enable_checkpointing=True, callbacks=[save_at(tmp_path, **when)])
    resumed = fit(tmp_path / "resumed", max_epochs=4, resume=tmp_path / name)
    assert resumed.ledger.num_steps == whole.ledger.num_steps == 16
    assert resumed.steps_taken == 16
    assert resumed.epsilon(1e-5) == pytest.approx(whole.epsilon(1e-5), rel=1e-9)


def test_checkpoint_keeps_the_plain_modules_keys(saved: Path) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    assert list(checkpoint["state_dict"]) == [name for name, _ in Classifier().named_parameters()]
    assert checkpoint["lightning_dp"]["ledger"]["num_steps"] == 4
    module = Classifier.load_from_checkpoint(saved, weights_only=True)
    torch.testing.assert_close(module.state_dict(), checkpoint["state_dict"])


def test_calibrated_noise_is_kept_on_resume(tmp_path: Path) -> None:
    def calibrated() -> DPStrategy:
        return DPStrategy(target_epsilon=2.0, target_delta=1e-3, check_per_sample=False)

    whole = fit(tmp_path / "whole", strategy=calibrated(), max_epochs=4)
    trainer = make_trainer(
        calibrated(), tmp_path, max_epochs=4, enable_checkpointing=True, callbacks=[save_at(tmp_path, every_n_epochs=1)]
    )
    trainer.fit(Classifier(), make_loader())
    resumed = fit(tmp_path / "resumed", strategy=calibrated(), max_epochs=4, resume=tmp_path / "epoch=1-step=8.ckpt")
    assert resumed.plan.noise_multiplier == trainer.strategy.plan.noise_multiplier == whole.plan.noise_multiplier
    assert 1.98 <= resumed.epsilon() <= 2.0


def test_a_longer_run_is_calibrated_to_what_is_left(tmp_path: Path) -> None:
    """Two epochs at a fixed sigma, then two more under a target: the whole stays within it."""
    fit(
        tmp_path,
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=[save_at(tmp_path)],
        strategy=DPStrategy(noise_multiplier=4.0, check_per_sample=False),
    )
    spent = DPStrategy(target_epsilon=3.0, target_delta=1e-3, check_per_sample=False)
    fit(tmp_path / "more", max_epochs=4, resume=tmp_path / "epoch=1-step=8.ckpt", strategy=spent)
    assert spent.ledger.num_steps == 16
    assert 2.97 <= spent.epsilon() <= 3.0


def test_noise_after_a_resume_differs_from_before(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    fit(
        tmp_path,
        max_epochs=1,
        enable_checkpointing=True,
        callbacks=[save_at(tmp_path), first],
        strategy=DPStrategy(noise_multiplier=1e4, check_per_sample=False),
    )
    for recorder in (second, Recorder()):
        fit(
            tmp_path / "on",
            max_epochs=2,
            resume=tmp_path / "epoch=0-step=4.ckpt",
            callbacks=[recorder],
            strategy=DPStrategy(noise_multiplier=1e4, check_per_sample=False),
        )
        seen = [torch.cat([g.flatten() for g in s.values()]) for s in first.before_step + recorder.before_step]
        correlations = torch.corrcoef(torch.stack(seen)).fill_diagonal_(0)
        assert float(correlations.abs().max()) < 0.75  # 53 coordinates: chance stays under .75 to 1e-9


def test_a_checkpoint_without_a_ledger_is_refused_unless_public(tmp_path: Path, public: Path) -> None:
    with pytest.raises(PrivacyError, match="allow_public_checkpoint=True"):
        fit(tmp_path, max_epochs=2, resume=public)
    strategy = DPStrategy(noise_multiplier=1.0, allow_public_checkpoint=True)
    fit(tmp_path, max_epochs=2, resume=public, strategy=strategy)
    assert strategy.ledger.num_steps == 4


def test_another_dataset_size_is_refused(tmp_path: Path, saved: Path) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.3), tmp_path, max_epochs=2)
    with pytest.raises(PrivacyError, match="64 records of the run being resumed, got 63"):
        trainer.fit(Classifier(), make_loader(63), ckpt_path=saved, weights_only=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.update(version=99), "in version 1"),
        (lambda state: state.update(step=77), "between 0 and the ledger's 4"),
        (lambda state: state.update(plan=3), "saved plan to be a dictionary"),
        (lambda state: state["ledger"]["entries"][0].update(noise_multiplier=-1.0), "noise_multiplier"),
        (lambda state: state.pop("ledger"), "damaged"),
    ],
)
def test_a_damaged_privacy_state_is_refused(tmp_path: Path, saved: Path, damage: Any, message: str) -> None:
    path = tmp_path / "damaged.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    damage(checkpoint["lightning_dp"])
    torch.save(checkpoint, path)
    with pytest.raises(PrivacyError, match=message):
        fit(tmp_path, max_epochs=2, resume=path)


def test_another_relation_is_refused(tmp_path: Path, saved: Path) -> None:
    other = DPStrategy(noise_multiplier=1.3, neighboring_relation="zero_out")
    with pytest.raises(PrivacyError, match="neighboring_relation='add_or_remove_one' as in the checkpoint"):
        fit(tmp_path, max_epochs=2, resume=saved, strategy=other)


def test_evaluation_loads_any_checkpoint(tmp_path: Path, public: Path) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path)
    loader = torch.utils.data.DataLoader(make_loader().dataset, batch_size=32)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(
            Classifier(),
            loader,
            ckpt_path=public,
            weights_only=True,
            **({} if run == trainer.predict else {"verbose": False}),
        )


def test_a_module_without_trainer_reads_any_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": Classifier().state_dict()}, path)
    strategy = DPStrategy(noise_multiplier=1.0)
    strategy.connect(Classifier())
    assert strategy.load_checkpoint(path, weights_only=True).keys() == {"state_dict"}
    assert not strategy.ledger.num_steps


def test_a_second_fit_goes_on_with_the_ledger(tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.3)
    trainer = make_trainer(strategy, tmp_path, max_epochs=1, callbacks=[EpsilonMonitor()])
    module = Classifier()
    trainer.fit(module, make_loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == strategy.steps_taken == 12


def test_an_exception_in_user_code_leaves_no_partial_sum(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and self.trainer.current_epoch == 0 and len(batch[0]) <= 4 and armed:
                armed.pop()
                raise KeyError("user")
            return super().training_step(batch, batch_idx)

    armed = [True]
    strategy = DPStrategy(noise_multiplier=0.0, microbatch_size=4, max_grad_norm=1e-3, check_per_sample=False)
    recorder = Recorder()
    module = Failing(lr=0.0)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=1)
    with pytest.raises(KeyError, match="user"):
        trainer.fit(module, make_loader(batch_size=32))
    trainer.fit(module, make_loader(batch_size=64))
    gradient = {name: g * 64 for name, g in recorder.before_step[-1].items()}
    expected = clipped_sum(module, *make_dataset().tensors, max_grad_norm=1e-3)
    for name, total in gradient.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-3, atol=1e-7)


def test_resume_within_an_accumulation_sums_no_two_batches(tmp_path: Path) -> None:
    """At q = 1 every record is in every logical batch: a sum over parts of two would hold some record twice."""

    class Constant(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self(torch.ones_like(batch[0])) * 1e-3).sum(1).mean()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if save and batch_idx == 0 and self.current_epoch == 0:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt")

    def run(resume: Path | None) -> list[float]:
        recorder = Recorder()
        module = Constant(network=torch.nn.Linear(6, 3), lr=0.0)
        trainer = make_trainer(
            DPStrategy(noise_multiplier=0.0, check_per_sample=False),
            tmp_path,
            callbacks=[recorder],
            accumulate_grad_batches=2,
            max_epochs=4,
        )
        trainer.fit(module, make_loader(batch_size=32), ckpt_path=resume, weights_only=True if resume else None)
        return [float(seen["network.bias"][0]) * 64 / 1e-3 for seen in recorder.before_step]

    save = True
    assert run(None) == pytest.approx([64.0] * 4)
    save = False
    held = run(tmp_path / "within.ckpt")
    assert held[0] < 64.5
    assert all(number < 64.5 for number in held)
    assert held[1:] == pytest.approx([64.0] * 3)
