"""PrivateTrainerMixin: the Trainer of transformers on a tiny BERT with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BatchEncoding,
    Trainer,
)

from lightning_dp import PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent
from lightning_dp.hf import STATE, check_arguments
from lightning_dp.step.history import carry
from tests.hf_runs import BATCH, Gradients, PrivateTrainer, arguments, start
from tests.reference import per_sample_gradients


@pytest.mark.slow
def test_gradient_equals_a_loop_over_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = start(tmp_path, {"noise_multiplier": 0.0, "microbatch_size": 5, "max_grad_norm": 0.2}, save_strategy="no")
    batches: list[Any] = []
    original = PrivateTrainer.training_step

    def keep(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append([part for _, part in inputs.microbatches])
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(PrivateTrainer, "training_step", keep)
    trainer.train()
    seen = next(each.seen for each in trainer.callback_handler.callbacks if isinstance(each, Gradients))
    assert len(batches) == len(seen) == 8
    model = trainer.model
    for parts, step in zip(batches, seen, strict=True):
        if not parts:
            continue
        model.load_state_dict({name: weight for name, (weight, _) in step.items()}, strict=False)
        words, labels = (torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels"))
        grads = per_sample_gradients(
            model, lambda i, w=words, y=labels: model(input_ids=w[i : i + 1], labels=y[i : i + 1]).loss, len(words)
        )
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
        factors = (0.2 / norms).clamp(max=1.0)
        for name, grad in grads.items():
            expected = torch.einsum("b,b...->...", factors, grad) / BATCH
            torch.testing.assert_close(step[name][1], expected, rtol=1e-3, atol=1e-6)


#: Owners of 32 sentences: one has 24 of them, six have one or two.
OWNERS = [0] * 24 + [1, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.slow
def test_very_unequal_users_are_clipped_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    privacy = {
        "noise_multiplier": 0.0, "microbatch_size": 5, "max_grad_norm": 0.2, "unit": OWNERS, "records_per_unit": 16,
    }  # fmt: skip
    trainer = start(tmp_path, privacy, save_strategy="no", per_device_train_batch_size=3, max_steps=8)
    batches: list[Any] = []
    original = PrivateTrainer.training_step

    def keep(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append(inputs.parts)
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(PrivateTrainer, "training_step", keep)
    trainer.train()
    seen = next(each.seen for each in trainer.callback_handler.callbacks if isinstance(each, Gradients))
    assert len(batches) == len(seen) == 8
    assert max(int(torch.bincount(owners).max()) for parts in batches for _, owners, _ in parts) <= 16
    model, num_users = trainer.model, 0
    for parts, step in zip(batches, seen, strict=True):
        model.load_state_dict({name: weight for name, (weight, _) in step.items()}, strict=False)
        total = {name: torch.zeros_like(weight) for name, (weight, _) in step.items()}
        for _, owners, records in parts:
            for user in owners.unique():
                rows = owners == user
                loss = model(input_ids=records["input_ids"][rows], labels=records["labels"][rows]).loss
                grads = torch.autograd.grad(loss, [parameter for _, parameter in model.named_parameters()])
                factor = min(1.0, 0.2 / float(torch.cat([grad.flatten() for grad in grads]).norm()))
                for name, grad in zip(total, grads, strict=True):
                    total[name] += factor * grad
                num_users += 1
        for name, (_, gradient) in step.items():
            torch.testing.assert_close(gradient, total[name] / 3, rtol=1e-3, atol=1e-6)
    assert num_users > 8
    assert (trainer.private.plan.dataset_size, trainer.private.plan.unit) == (7, "user")
    assert "all records of one user" in trainer.private.privacy_statement()


def test_log_has_epsilon_and_no_loss(tmp_path: Path) -> None:
    trainer = start(tmp_path, {"target_epsilon": 4.0, "target_delta": 1e-3}, save_strategy="no")
    trainer.train()
    rows = trainer.state.log_history
    assert not any("loss" in name for row in rows for name in row)
    spent = [row["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert spent[-1] == trainer.private.epsilon()
    assert 3.9 < spent[-1] <= 4.0


def test_loss_is_logged_on_request_and_named(tmp_path: Path) -> None:
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, log_loss=True, save_strategy="no", max_steps=2)
    trainer.train()
    rows = trainer.state.log_history
    assert 0.3 < rows[0]["nonprivate/loss"] < 1.5
    assert not any("loss" in name and not name.startswith("nonprivate/") for row in rows for name in row)
    assert "logged without noise: nonprivate_loss" in trainer.private.privacy_statement()


class Logging(PrivateTrainer):
    """Logs a figure in compute_loss, and counts the calls."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.log({"score": 0.5})
        return super().compute_loss(model, inputs, *args, **kwargs)


class Adding(Trainer):
    """Adds a figure to what is logged."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "added": 0.5}, *args, **kwargs)


class Both(Logging, Adding):
    pass


def test_compute_loss_acts_once_a_step_and_its_logs_are_named(tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 1.0, "microbatch_size": 2, "seed": 1}
    trainer = start(tmp_path, privacy, kind=Both, save_strategy="no", max_steps=3, logging_steps=2)
    trainer.train()
    assert trainer.calls == 3
    assert [row["score"] for row in trainer.state.log_history if "score" in row] == [0.5] * 3
    assert trainer.private.state.nonprivate_logs == {"score", "added"}


class WithModes(torch.optim.SGD):
    """Steps on the weights of training only, as optimizers without a schedule do."""

    trains = False

    def train(self) -> None:
        self.trains = True

    def eval(self) -> None:
        self.trains = False

    def step(self, closure: Any = None) -> None:
        assert self.trains
        super().step(closure)


class Scheduleless(PrivateTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = self.optimizer or WithModes(self.model.parameters(), lr=0.1)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluate(self.train_dataset)
        return super().training_step(*args, **kwargs)


def test_an_optimizer_with_modes_trains_after_an_evaluation(tmp_path: Path) -> None:
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, kind=Scheduleless, save_strategy="no", max_steps=2)
    trainer.train()
    assert trainer.private.ledger.num_steps == 2


class Stopping(PrivateTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.control.should_training_stop = bool(inputs["labels"][0])
        return super().compute_loss(model, inputs, *args, **kwargs)


class Scheduling(PrivateTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.lr_scheduler.last_epoch += int(inputs["labels"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "name"), [(Stopping, "TrainerControl.should_training_stop"), (Scheduling, "LambdaLR.last_epoch")]
)
def test_decisions_by_records_in_compute_loss_are_refused(kind: Any, name: str, tmp_path: Path) -> None:
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, kind=kind, save_strategy="no", max_steps=3)
    with pytest.raises(PrivacyError, match=f"training_step leaves '{name}' with another value"):
        trainer.train()
    assert trainer.state.global_step == 0


class Reading(PrivateTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {"input_ids": inputs.input_ids, "labels": inputs.pop("labels")})


def test_batches_keep_their_kind_and_a_loader_may_be_made_early(tmp_path: Path) -> None:
    def collate(records: Any) -> Any:
        return BatchEncoding({name: torch.stack([one[name] for one in records]) for name in records[0]})

    options = {"collator": collate, "save_strategy": "no", "max_steps": 2}
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, kind=Reading, **options)
    assert len(trainer.get_train_dataloader()) == 4
    trainer.train()
    assert trainer.private.ledger.num_steps == 2


@pytest.mark.slow
def test_resumed_run_spends_what_one_run_does(tmp_path: Path) -> None:
    privacy = {"target_epsilon": 4.0, "target_delta": 1e-3}
    half = start(tmp_path, privacy, stop=3)
    half.train()
    assert (tmp_path / "checkpoint-3" / STATE).is_file()
    trainer = start(tmp_path, privacy)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.private.ledger.num_steps == trainer.state.global_step == 8
    assert trainer.private.plan.noise_multiplier == half.private.plan.noise_multiplier
    assert 3.9 < trainer.private.epsilon() <= 4.0
    with pytest.raises(ValueError, match=r"Expected TrainingArguments\(ignore_data_skip=True\) to resume"):
        start(tmp_path, privacy, ignore_data_skip=False).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3" / STATE).unlink()
    with pytest.raises(PrivacyError, match=r"Expected a checkpoint of a private run, got .* without privacy\.pt"):
        start(tmp_path, privacy).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trained by an earlier private run:UserWarning")
def test_second_training_counts_all_before(tmp_path: Path) -> None:
    """The first one, and a run of somebody else's on the same model in between."""
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, save_strategy="no", max_steps=2)
    trainer.train()
    (between := Ledger()).record(PrivacyEvent.gaussian(noise_multiplier=1.0), 5)
    carry(trainer.model.parameters(), between)
    trainer.train()
    assert trainer.private.ledger.num_steps == 9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_grad_norm": 1.0}, r"Expected TrainingArguments\(max_grad_norm=0\) .* got max_grad_norm=1.0"),
        ({"gradient_accumulation_steps": 2}, "got gradient_accumulation_steps=2. Use a larger per_device"),
        ({"auto_find_batch_size": True}, "got auto_find_batch_size=True"),
        ({"include_num_input_tokens_seen": "all"}, "got include_num_input_tokens_seen='all'. How many tokens"),
        ({"train_sampling_strategy": "group_by_length"}, "got train_sampling_strategy=.*drawn independently"),
        ({"neftune_noise_alpha": 5.0}, "got neftune_noise_alpha=5.0. The longest record"),
        ({"optim": "lomo"}, "Expected an optimizer that steps after the backward"),
    ],
)
def test_arguments_that_cannot_be_private_are_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        check_arguments(arguments(tmp_path, **options))
    check_arguments(arguments(tmp_path))


def test_calls_that_cannot_be_private_are_refused(tmp_path: Path) -> None:
    trainer = start(tmp_path, {"noise_multiplier": 1.0}, num_train_epochs=1.5)
    with pytest.raises(ValueError, match=r"Expected whole epochs, got num_train_epochs=1\.5"):
        trainer.train()
    with pytest.raises(ValueError, match="Expected no hyperparameter_search"):
        trainer.hyperparameter_search()
    with pytest.raises(RuntimeError, match=r"there is none yet\. Call train"):
        _ = trainer.private
    with pytest.raises(ValueError, match="Expected a checkpoint in output_dir"):
        trainer.train(resume_from_checkpoint=True)
