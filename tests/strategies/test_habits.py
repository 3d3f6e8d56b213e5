"""Habits of Lightning's users that a private strategy must not break."""

from __future__ import annotations

import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, make_loader, make_trainer


def private(**options: Any) -> DPStrategy:
    return DPStrategy(**{"noise_multiplier": 1.3, "target_delta": 1e-5, **options})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.one_in(2)
def test_batch_size_of_the_loader_is_the_users(tmp_path: Path, accumulate: int) -> None:
    trainer = make_trainer(private(), tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(Classifier(), make_loader(batch_size=8))
    assert trainer.train_dataloader.batch_size == 8
    assert trainer.strategy.plan.expected_batch_size == 8 * accumulate


class Stopping(L.Callback):
    """Saves a checkpoint in mid-epoch and ends the run there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.slow
def test_plain_trainer_resumes_a_private_run_in_mid_epoch(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    module = Classifier()
    make_trainer(private(), tmp_path, callbacks=[Stopping(path)], min_steps=1).fit(module, make_loader())
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2  # of four
    plain = make_trainer("auto", tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match="ended before the epoch ended and your dataloader is not resumable"):
        plain.fit(Classifier(), make_loader(), ckpt_path=path, weights_only=True)
    assert plain.global_step > 2


def test_hooks_get_the_users_outputs_where_nothing_was_drawn(tmp_path: Path) -> None:
    """Also on an empty batch, on which ``training_step`` runs on a stand-in."""
    keys: list[set[str]] = []
    sizes: list[int] = []

    class Returning(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "num": len(batch[0])}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            keys.append(set(outputs))
            sizes.append(len(batch[1]))

    make_trainer(private(), tmp_path).fit(Returning(), make_loader(batch_size=1))
    assert 0 in sizes
    assert keys == [{"loss", "num"}] * len(sizes)


def scaled_loss(module: nn.Module, batch: Any, batch_idx: int, *, scale: float) -> Tensor:
    return scale * nn.functional.cross_entropy(module(batch[0]), batch[1])


def test_training_step_may_be_a_partial(tmp_path: Path) -> None:
    module = Classifier()
    before = [p.detach().clone() for p in module.parameters()]
    module.training_step = functools.partial(scaled_loss, module, scale=0.5)  # type: ignore[method-assign]
    strategy = private()
    make_trainer(strategy, tmp_path).fit(module, make_loader())
    assert strategy.ledger.num_steps == 4
    assert all(bool((p != old).any()) for p, old in zip(module.parameters(), before, strict=True))


def test_a_module_without_optimizers_trains_nothing(tmp_path: Path) -> None:
    """Nothing is released, and the weights stay, as without privacy."""

    class Still(Classifier):
        def configure_optimizers(self) -> None:
            return None

    module, strategy = Still(), private()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = make_trainer(strategy, tmp_path)
    with pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"):
        trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == 0
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_optimizer_step_is_called_within_the_last_of_its_batches(tmp_path: Path) -> None:
    class Stepping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.begun = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.begun = False

        def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
            assert batch_idx in (1, 3)
            assert self.begun
            super().optimizer_step(epoch, batch_idx, *args, **kwargs)

    strategy = private()
    make_trainer(strategy, tmp_path, accumulate_grad_batches=2, limit_train_batches=4).fit(Stepping(), make_loader())
    assert strategy.ledger.num_steps == 2


@pytest.mark.slow
def test_a_step_on_trial_sees_that_the_run_is_about_to_end(tmp_path: Path) -> None:
    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.trainer.should_stop is (self.current_epoch == 2)
            self.log("constant", 1.0, on_epoch=True)
            return super().training_step(batch, batch_idx)

    stop, strategy = EarlyStopping("constant", patience=0, check_on_train_epoch_end=True), private()
    trainer = make_trainer(strategy, tmp_path, min_epochs=3, max_epochs=3, callbacks=[stop])
    trainer.fit(Reads(), make_loader())
    assert strategy.ledger.num_steps == 12  # a regular check ran in the last epoch, before step 10


def test_counters_of_a_datamodule_count_real_batches(tmp_path: Path) -> None:
    """Checks and further microbatches leave them as they are, so what follows from them is public."""

    class Counting(L.LightningDataModule):
        count = 0

        def train_dataloader(self) -> Any:
            return make_loader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.count += 1
            return [batch[0] * (1 + self.count % 2), batch[1]]

    data = Counting()
    make_trainer(private(microbatch_size=4), tmp_path).fit(Classifier(), datamodule=data)
    assert data.count == 4


def test_hooks_run_in_the_same_order_for_an_empty_batch(tmp_path: Path) -> None:
    class Noting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.calls.append("transfer")
            return batch

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.calls.append("start")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls.append("step")
            return super().training_step(batch, batch_idx)

    module = Noting()
    make_trainer(private(), tmp_path).fit(module, make_loader(num_records=40, batch_size=1))  # about 15 empty ones
    assert module.calls == ["transfer", "start", "step"] * 40


def test_a_dictionary_without_a_loss_is_named(tmp_path: Path) -> None:
    class Other(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"output": 5}

    with pytest.raises(TypeError, match=r"or None, got a dictionary with \['output'\] only"):
        make_trainer(private(), tmp_path).fit(Other(), make_loader())


def test_load_checkpoint_before_a_module_is_attached(tmp_path: Path) -> None:
    """A strategy by itself reads a file, private or not, as Lightning's own do."""
    path = tmp_path / "last.ckpt"
    trainer = make_trainer(private(), tmp_path)
    trainer.fit(Classifier(), make_loader())
    trainer.save_checkpoint(path)
    strategy = private()
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    assert checkpoint["lightning_dp"]["ledger"]["num_steps"] == 4
    assert strategy.ledger.num_steps == 0
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:500])
    with pytest.raises(PrivacyError, match="cannot be read"):
        strategy.load_checkpoint(tmp_path / "broken.ckpt", weights_only=True)


def test_a_step_without_a_loss_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx == 0 else None

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not self.trainer.strategy.is_on_trial:
                ended.append(outputs.keys())

    ended: list[Any] = []
    strategy = private()
    Closure.warning_cache.clear()  # Lightning warns once in a process
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="`training_step` returned `None`"):
        make_trainer(strategy, tmp_path).fit(Forgetful(), make_loader())
    assert ended == [{"loss"}, set(), set(), set()]
    said = [record.getMessage() for record in caplog.records if "returned no loss" in record.getMessage()]
    assert len(said) == 1
    assert "counts towards epsilon" in said[0]
    assert strategy.ledger.num_steps == 4


def test_a_warning_of_the_users_step_is_shown_once(tmp_path: Path) -> None:
    class Warns(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            warnings.warn("careful", stacklevel=1)
            return super().training_step(batch, batch_idx)

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        make_trainer(private(grad_sample="single"), tmp_path).fit(Warns(), make_loader())
    assert [str(each.message) for each in shown].count("careful") == 1


@pytest.mark.parametrize("is_output", [False, True])
def test_noise_leaves_the_row_of_padding_alone(tmp_path: Path, is_output: bool) -> None:
    """Sums over padded words need it to stay zero; where the table also scores words, the row has a gradient."""

    class Words(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 6, padding_idx=0)  # no record has the last word

        def forward(self, words: Tensor) -> Tensor:
            rows = self.table(words).sum(1)
            scores = nn.functional.linear(rows, self.table.weight) if is_output else self.network(rows)
            return scores[:, :3]

    words = [torch.arange(1, 3 + index % 3) for index in range(64)]
    data = TensorDataset(nn.utils.rnn.pad_sequence(words, batch_first=True), torch.arange(64) % 3)
    module = Words()
    before = module.table.weight.detach().clone()
    make_trainer(private(), tmp_path).fit(module, DataLoader(data, batch_size=16))
    assert (module.table.weight != before).any(1).tolist() == [is_output, True, True, True, True, True]
