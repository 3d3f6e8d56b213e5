"""The way in which samples run: one at a time by itself where no rule can follow, never where samples are coupled."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_dp import DPStrategy, PrivacyError, make_private
from lightning_dp.per_sample import PerSampleEngine, SingleSampleEngine
from tests.helpers import Hidden, make_trainer

NUM, FEATURES, CLASSES = 12, 4, 3


class Model(L.LightningModule):
    """A layer that no rule can follow, and a head; ``mix`` may couple the samples."""

    def __init__(self, mix: Any = None, loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.head = nn.Parameter(torch.randn(FEATURES, 5)), nn.Linear(5, CLASSES)
        self.mix, self.loss = mix or (lambda x: x), loss or F.cross_entropy

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(Hidden.apply(x, self.weight).tanh()))
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self.loss(self(batch[0]), batch[1])
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.arange(NUM) % CLASSES)


def fit(module: L.LightningModule, dataset: Any = None, **options: Any) -> Any:
    loader_options = {key: options.pop(key) for key in ("num_workers", "collate_fn") if key in options}
    trainer_options = {key: options.pop(key) for key in ("max_epochs", "precision", "ckpt_path") if key in options}
    path = trainer_options.pop("ckpt_path", None)
    strategy = DPStrategy(**{"noise_multiplier": 0.0, "seed": 0, "sampling": "shuffle", **options})
    trainer = make_trainer(strategy, None, **trainer_options)
    trainer.fit(
        module, DataLoader(dataset or data(), batch_size=4, **loader_options), ckpt_path=path, weights_only=False
    )
    return trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# ---------------------------------------------------------------- the way and its result


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 1}, {"collate_fn": lambda records: _stacked(records)}],
    ids=["plain", "worker", "own collate"],
)
@pytest.mark.one_in(3)
def test_auto_takes_single_by_itself_with_its_result(options: dict[str, Any], caplog: Any) -> None:
    if "num_workers" in options:
        options = {**options, "dataset": Records()}
    caplog.set_level(logging.INFO)
    chosen, given = Model().double(), Model().double()
    options = {"dataset": data(torch.float64), **options, "max_grad_norm": 0.3, "max_epochs": 2}
    trainer = fit(chosen, precision="64-true", **options)
    said = [r.message for r in caplog.records if "Samples run one at a time" in r.message]
    fit(given, precision="64-true", grad_sample="single", **options)
    torch.testing.assert_close(weights(chosen), weights(given), rtol=1e-12, atol=1e-12)
    assert len(said) == 1
    assert "torch.autograd.Function" in said[0]
    assert "times as long" in said[0]
    statement = trainer.strategy.privacy_statement()
    assert "by construction, one sample runs at a time, since no rule follows" in statement
    assert "checked on" not in statement


@pytest.mark.slow
def test_sparse_functions_of_parameters_run_one_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    class Sparse(Model):
        def forward(self, x: Tensor) -> Tensor:
            at = torch.stack([torch.arange(5) % FEATURES, torch.arange(5)])
            weight = torch.sparse_coo_tensor(at, self.weight[0], (FEATURES, 5), check_invariants=True)
            weight = torch.sparse.softmax(weight, 0)
            out: Tensor = self.head(torch.sparse.mm(weight.t(), x.mT).mT.tanh())
            return out

    with caplog.at_level(logging.INFO):
        fit(Sparse())
    assert "Samples run one at a time" in caplog.text


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors_that_other_packages_wrap_choose_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """As einx does, which compiles operations and raises an exception of its own where one of them fails."""

    class Wrapping(Model):
        def forward(self, x: Tensor) -> Tensor:
            try:
                hidden = F.linear(torch.nested.nested_tensor([*x[:, None]]), self.weight.T)
            except PrivacyError as error:
                raise KeyError("the compiled operation failed") from error
            out: Tensor = self.head(torch.nested.to_padded_tensor(hidden, 0.0)[:, 0].tanh())
            return out

    with caplog.at_level(logging.INFO):
        fit(Wrapping())
    assert "Samples run one at a time" in caplog.text


class Records(Dataset[Any]):
    """Records of their own randomness, read in workers."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        x, label = data(torch.float64)[index]
        return x + 0.01 * torch.rand(()), label


def _stacked(records: list[Any]) -> Any:
    return [torch.stack([record[i] for record in records]) for i in range(2)]


def test_auto_takes_single_in_a_loop_of_the_users() -> None:
    chosen = Model()
    for grad_sample, kind in (("auto", SingleSampleEngine), ("auto", PerSampleEngine)):
        model: Any = chosen if kind is SingleSampleEngine else nn.Linear(FEATURES, CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with make_private(
            model,
            optimizer,
            DataLoader(data(), batch_size=4),
            lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
            noise_multiplier=1.0,
            target_delta=1e-3,
            grad_sample=grad_sample,
        ) as private:
            for batch in private.loader:
                private.step(batch)
            assert isinstance(private._fit.step.engine, kind)  # type: ignore[union-attr]
        assert private.state.ledger.num_steps == 3


def test_rules_raise_where_auto_falls() -> None:
    with pytest.raises(PrivacyError, match=r"another use for \['weight'\]: the torch\.autograd\.Function Hidden"):
        fit(Model(), grad_sample="rules")


def test_a_hook_that_sorts_is_named() -> None:
    class Sorts(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [tensor.flip(0) for tensor in batch]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x @ self.weight)
            return out

    with pytest.raises(PrivacyError, match=r"records in another order\. Likely cause: a collate function"):
        fit(Sorts(), grad_sample="rules")


class Sorting(Model):
    """Records are sorted by their first value before a cell, as older code sorts sequences by length."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].sort(descending=True).indices
        out: Tensor = self.head(torch.tanh(x[order] @ self.weight))[order.sort().indices]
        return out


def test_a_step_that_sorts_runs_by_rules_with_its_result() -> None:
    by_rules, alone = Sorting().double(), Sorting().double()
    options: dict[str, Any] = {"dataset": data(torch.float64), "precision": "64-true", "max_grad_norm": 0.3}
    trainer = fit(by_rules, grad_sample="rules", **options)
    fit(alone, grad_sample="single", **options)
    assert not trainer.strategy.state.runs_alone
    torch.testing.assert_close(weights(by_rules), weights(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_what_rules_follow_stays_together() -> None:
    module = Model()
    module.forward = lambda x: module.head(torch.tanh(x @ module.weight))  # type: ignore[method-assign]
    strategy = fit(module).strategy
    assert not strategy.state.runs_alone
    assert "by construction" not in strategy.privacy_statement()


def test_a_stream_cannot_be_cut_and_says_so() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([data()[i] for i in range(NUM)])

    with pytest.raises(PrivacyError, match=r"random access.*got a stream.*grad_sample='single'"):
        fit(Model(), Stream(), target_delta=1e-3, neighboring_relation="replace_one")


class Weighted(L.LightningModule):
    """Two tasks whose losses have learned weights, and a penalty on weights; ``join`` makes the loss of the batch."""

    def __init__(self, join: Any, mean: Any = lambda loss, step: loss.mean()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.label, self.size = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES), nn.Linear(5, 1)
        self.s, self.one = nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor([0.4]))
        self.join, self.mean = join, mean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden, step = self.body(batch[0]).tanh(), self.trainer.global_step
        label = F.cross_entropy(self.label(hidden), batch[1], reduction="none")
        out: Tensor = self.join(self, self.mean(label, step), F.mse_loss(self.size(hidden)[:, 0], batch[0].sum(1)))
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def apart(m: Any, a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-m.s[0]) * a + m.s[0] + torch.exp(-m.s[1]) * b + m.s[1] + 0.0 * m.one.sum()


def test_a_resumed_run_stays_one_at_a_time(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit(Model())
    first.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.setattr("lightning_dp.trials.ways.OneByOne.choose", None)  # nothing is chosen a second time
    module = Model()
    resumed = fit(module, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.strategy.ledger.num_steps == 6
    assert resumed.strategy.state.runs_alone
