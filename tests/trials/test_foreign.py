"""User code on trial: what it raises, one record that cannot run alone, and state that cannot be written to."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.per_sample.engine import PerSampleEngine
from lightning_dp.trials.foreign import ForeignCode, OneAloneError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_loader, make_trainer


class NeedsTwo(Classifier):
    """Raises on one record, as a correlation does, or a loss after ``squeeze()``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) < 2:
            raise ValueError("Needs at least two samples to calculate r2 score")
        return super().training_step(batch, batch_idx)


class NeedsTwoAndMixes(NeedsTwo):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        return super().training_step((features - features.mean(0), labels), batch_idx)


class Sums(NeedsTwo):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")


def fit(module: Any, tmp_path: Any, loader: Any = None, **options: Any) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, **options)
    make_trainer(strategy, tmp_path).fit(module, loader or make_loader())
    return strategy


@pytest.mark.parametrize(("module", "reduction"), [(NeedsTwo, "mean"), (Sums, "sum"), (Sums, "auto")])
@pytest.mark.one_in(3)
def test_a_step_that_needs_two_records_is_checked_on_copies(
    module: Any, reduction: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        strategy = fit(module(), tmp_path, loss_reduction=reduction)
    assert strategy.ledger.num_steps == 4
    (said,) = [r.getMessage() for r in caplog.records if "on one record alone" in r.getMessage()]
    assert "raised ValueError on one record alone (Needs at least two samples" in said


class Meter:
    num = 0


class ComputesAtTheEnd(Classifier):
    """Computes and resets a metric over two records when an epoch ends, as many modules of packages do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Meter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.num += len(batch[0])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.seen.num < 2:
            raise ValueError("Needs at least two samples to calculate r2 score")
        self.seen.num = 0
        self.epochs = self.current_epoch


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "single"])
def test_an_epoch_end_that_needs_two_records_runs_on_copies(
    way: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, grad_sample=way)
    with caplog.at_level(logging.INFO):
        make_trainer(strategy, tmp_path, max_epochs=3).fit(ComputesAtTheEnd(), make_loader())
    assert strategy.ledger.num_steps == 12
    assert any("a hook raised ValueError on one record alone" in r.getMessage() for r in caplog.records)


def test_copies_do_not_hide_that_samples_are_mixed(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="samples influence each other"):
        fit(NeedsTwoAndMixes(), tmp_path)


def test_copies_do_not_hide_state_that_counts_records(tmp_path: Any) -> None:
    class Counts(NeedsTwo):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.seen += len(batch[0])
            return loss

    with pytest.raises(PrivacyError, match=r"'seen' with another value after 3 records instead of 2"):
        fit(Counts(), tmp_path)


def test_empty_batches_are_stood_in_for_by_copies(tmp_path: Any) -> None:
    class NeedsTwoUnlessDrawn(NeedsTwo):
        """Runs on one record if it was drawn, so that most batches of this run are empty or run."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            strategy = self.trainer.strategy
            if strategy.is_on_trial or strategy._fit.step.recording.weight == 0.0:
                return super().training_step(batch, batch_idx)
            return Classifier.training_step(self, batch, batch_idx)

    module = NeedsTwoUnlessDrawn(lr=0.0)
    recorder, strategy = Recorder(), DPStrategy(noise_multiplier=0.0)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(module, make_loader(batch_size=1))
    assert strategy.ledger.num_steps == 64
    empty = [all(float(g.abs().max()) == 0 for g in seen.values()) for seen in recorder.before_step]
    assert 5 < sum(empty) < 60


def test_what_a_step_raises_on_trial_is_reported_as_ours(tmp_path: Any) -> None:
    class Bug(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("tokens")

    with pytest.raises(KeyError, match="tokens") as error:
        fit(Bug(), tmp_path)
    (note,) = error.value.__notes__
    assert note == "lightning_dp had called the training step on trial, without effect, with 2 records."


def test_a_step_for_one_size_is_told_that_sizes_vary(tmp_path: Any) -> None:
    class OfSixteen(Classifier):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features + torch.ones(16, 6))

    with pytest.raises(RuntimeError, match="must match the size") as error:
        fit(OfSixteen(), tmp_path)
    assert error.value.__notes__[0].endswith("the step must run on any number of records.")


def test_step_that_needs_two_is_not_doubled_for_one(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="Needs at least two") as error:
        fit(NeedsTwo(), tmp_path, microbatch_size=1)
    assert error.value.__notes__[0].endswith("with 1 record, as training runs it.")


class Host:
    """Takes any number of records but one."""

    def __init__(self, *, sums: bool) -> None:
        self.calls: list[int] = []
        self.sums = sums

    def run(self, records: list[float]) -> Tensor:
        self.calls.append(len(records))
        if len(records) == 1:
            raise IndexError("too few dimensions")
        total = torch.tensor(records).sum()
        return total if self.sums else total / len(records)

    def loss_of(self, output: Tensor, count: int) -> Tensor:
        return output


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_two_copies_is_that_of_the_record(reduction: str) -> None:
    host = Host(sums=reduction == "sum")
    code = ForeignCode(host, reduction=lambda: reduction, runs_alone=False)  # type: ignore[arg-type]
    with pytest.raises(OneAloneError):
        code.run([3.0])
    put_back: list[int] = []
    found: list[float] = []
    code.attempt(lambda: found.append(float(code.loss_of(code.run([3.0]), 1))), lambda: put_back.append(1))
    assert found == [3.0]
    assert put_back == [1]
    assert host.calls == [1, 1, 2]
    assert float(code.loss_of(code.run([1.0, 2.0]), 2)) == (3.0 if reduction == "sum" else 1.5)


class Frozen(OrderedDict):
    """A mapping that takes no change once it is made, and shows its items as attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            setattr(self, key, value)
        self.__dict__["is_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("is_frozen"):
            raise TypeError("frozen")
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if self.__dict__.get("is_frozen"):
            raise TypeError("frozen")
        super().__setitem__(name, value)

    def clear(self) -> None:
        raise TypeError("frozen")


class Output(OrderedDict):
    """A mapping with a constructor of its own, which holds an object that is no tensor."""

    def __init__(self, logits: Tensor, cache: Any) -> None:
        super().__init__(logits=logits, cache=cache)


class WithConfig(Classifier):
    """Keeps a frozen configuration, and returns mappings from layers and from the step."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen(width=5, layers=[1, 2], more=Frozen(a=1))

    def forward(self, features: Tensor) -> Any:
        return Output(self.network(features), object())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        output = self(features)
        loss = nn.functional.cross_entropy(output["logits"], labels)
        return {"loss": loss, "output": output, "object": object(), "name": "x"}


def test_frozen_mappings_and_objects_in_outputs_train(tmp_path: Any) -> None:
    module = WithConfig()
    assert fit(module, tmp_path).ledger.num_steps == 4
    assert dict(module.config) == {"width": 5, "layers": [1, 2], "more": Frozen(a=1)}


class Scaled(Classifier):
    """Parameters of its own, with dropout and random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(NUM_FEATURES))
        self.mean = nn.Parameter(torch.zeros(NUM_FEATURES))
        self.spread = nn.Parameter(torch.zeros(NUM_CLASSES))

    def forward(self, features: Tensor) -> Tensor:
        drawn = torch.distributions.Normal(self.mean, self.scale.exp()).rsample((len(features),))
        hidden = nn.functional.dropout(features * self.scale + drawn, 0.2)
        return self.network(hidden) * self.spread.exp()


@pytest.mark.slow
def test_bare_parameters_beside_dropout_and_rsample_train(tmp_path: Any) -> None:
    assert fit(Scaled(), tmp_path).ledger.num_steps == 4


def test_a_wrong_per_sample_gradient_is_reported_as_ours(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Samples are independent then, so that they may run one at a time."""
    gradients = PerSampleEngine.per_sample_gradients

    def mixed(self: Any, names: Any = None) -> dict[str, Tensor]:
        return {name: (gradient + gradient.roll(1, 0)) / 2 for name, gradient in gradients(self, names).items()}

    monkeypatch.setattr(PerSampleEngine, "per_sample_gradients", mixed)
    with pytest.raises(PrivacyError, match=r"so no sample influences another.* which is ours to mend"):
        fit(Classifier(), tmp_path, grad_sample="rules")
    with caplog.at_level(logging.INFO):
        assert fit(Classifier(), tmp_path).state.runs_alone
    assert "one at a time, through plain autograd. Expected the gradient of every sample" in caplog.text


def test_a_guard_over_the_batch_is_named_as_the_cause(tmp_path: Any) -> None:
    class Guarded(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    with pytest.raises(PrivacyError, match=r"was made NaN, .* Likely causes: a guard that skips, resets") as error:
        fit(Guarded(), tmp_path)
    assert "BatchNorm" not in str(error.value)


def test_a_copy_runs_on_a_copy_of_its_host() -> None:
    """A callback that holds the trainer is copied with all that the trainer holds."""
    host = Recorder()
    copied = copy.deepcopy(ForeignCode(host, reduction=lambda: "mean", runs_alone=False))  # type: ignore[arg-type]
    assert type(copied._host) is Recorder
    assert copied._host is not host
