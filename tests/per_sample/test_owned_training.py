"""Private training on rows of unequal number, end to end: what a Trainer hands the engine."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy
from lightning_dp.errors import PrivacyError
from tests.helpers import make_trainer
from tests.per_sample.owners import GCN, Graphs, _collate_graphs, _graph
from tests.per_sample.test_owners import Loop


class Training(L.LightningModule):
    """A module whose loss is the mean of one loss per sample."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(
    module: nn.Module,
    data: Any,
    collate: Any = None,
    kind: Any = Training,
    *,
    batch_size: int = 4,
    epochs: int = 1,
    **options: Any,
) -> DPStrategy:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "seed": 0, **options})
    trainer = make_trainer(strategy, None, max_epochs=epochs)
    trainer.fit(kind(module), DataLoader(data, batch_size=batch_size, collate_fn=collate))
    return strategy


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["mapping", "object"])
@pytest.mark.one_in(2)
def test_graphs_train_privately_by_rules(kind: str) -> None:
    torch.manual_seed(0)
    module = GCN("gcn")
    module.of_edges.requires_grad_(False)
    module.att.requires_grad_(False)

    def collate(records: list[Any]) -> Any:
        batch = _collate_graphs(records)
        return Graphs(**batch) if kind == "object" else batch

    before = module.first.weight.detach().clone()
    strategy = fit(module, [_graph(i % 4) for i in range(12)], collate)
    assert strategy._fit is None
    assert strategy.ledger.num_steps == 3
    assert not torch.equal(before, module.first.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["slices", "sum of losses"])
@pytest.mark.one_in(2)
def test_loops_over_samples_train_privately(how: str) -> None:
    torch.manual_seed(0)
    module = Loop(how)
    options = {"loss_reduction": "sum"} if how == "sum of losses" else {}
    strategy = fit(module, torch.randn(12, 3, dtype=torch.float64), **options)
    assert strategy.ledger.num_steps == 3


class Weighted(nn.Module):
    """Sets whose losses have weights, which pass through Python as numbers; with ``shift=1``, that of another set."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 2), shift

    def forward(self, batch: list[Tensor]) -> Tensor:
        weights = torch.tensor([float(one.mean()) for one in batch]).roll(self.shift)
        rows = self.layer(torch.cat(batch)).square().sum(1).split([len(one) for one in batch])
        return torch.stack([one.sum() for one in rows]) * weights


def _sets() -> list[Tensor]:
    return [torch.rand(1 + i % 4, 3, generator=torch.Generator().manual_seed(i)) + 0.1 for i in range(12)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_of_the_same_record_train() -> None:
    assert fit(Weighted(0), _sets(), list, grad_sample="rules").ledger.num_steps == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_numbers_of_another_record_are_refused() -> None:
    with pytest.raises(PrivacyError, match="gradient of every sample in a batch to be its gradient when run alone"):
        fit(Weighted(1), _sets(), list)


class Scaled(nn.Module):
    """Sets whose features have weights: from the collation, from a hook before the step, or kept as an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how, self.weights = nn.Linear(3, 2), how, torch.ones(3)

    def forward(self, batch: tuple[list[Tensor], Any]) -> Tensor:
        sets, weights = batch
        rows = self.layer(torch.cat(sets) * (weights() if self.how == "collation" else self.weights))
        return torch.stack([one.square().sum() for one in rows.split([len(one) for one in sets])])


class Hooked(Training):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.inner.how == "hook":
            self.inner.weights = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["collation", "hook", "attribute"])
@pytest.mark.one_in(3)
def test_constants_from_outside_the_step_train(how: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def collate(sets: list[Tensor]) -> Any:
        weights = torch.tensor([1.0, 2.0, 3.0])
        return sets, lambda: weights

    strategy = fit(Scaled(how), _sets(), collate, kind=Hooked)
    assert strategy.ledger.num_steps == 3
    assert ("Samples run one at a time" in caplog.text) == (how == "collation")  # such a tensor may hold data


class Tokens(nn.Module):
    """A loss over all tokens of the batch that are not padding: samples share its denominator."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = batch
        return nn.functional.cross_entropy(self.head(self.tokens(tokens)).flatten(0, 1), labels.flatten())


def _padded(num: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    records = []
    for i in range(num):
        labels = torch.randint(3, (5,), generator=generator)
        labels[1 + i % 4 :] = -100
        records.append((torch.randint(7, (5,), generator=generator), labels))
    return records


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_shared_denominator_is_refused_and_names_the_way_out() -> None:
    with pytest.raises(PrivacyError, match=r"(?s)share a denominator.*per_sample_loss=True") as caught:
        fit(Tokens(), _padded(12))
    assert "microbatch_size=1" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_per_sample_loss_counts_each_records_own_loss() -> None:
    """The gradient of the first step is the clipped sum of the gradients of the records run alone."""
    torch.manual_seed(0)
    module, data = Tokens(), _padded(4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in before.items()}
    for tokens, labels in data:
        module.zero_grad()
        module((tokens[None], labels[None])).backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()  # type: ignore[union-attr]
        for name, p in module.named_parameters():
            expected[name] += p.grad * min(1.0, 0.5 / float(norm)) / 4  # type: ignore[operator]
    module.zero_grad()
    strategy = fit(module, data, noise_multiplier=0.0, max_grad_norm=0.5, sampling="shuffle", per_sample_loss=True)
    for name, p in module.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), 0.1 * expected[name], rtol=1e-5, atol=1e-7)
    assert "objective: the loss of each record by itself" in strategy.privacy_statement()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_single_runs_what_rules_refuse() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return _Twice.apply(self.layer(x), self.layer.weight).square().squeeze(1)  # type: ignore[no-untyped-call]

    data = torch.randn(8, 3, dtype=torch.float64)
    with pytest.raises(PrivacyError, match="grad_sample='single' works for any module"):
        fit(Scripted(), data, grad_sample="rules")
    strategy = fit(Scripted(), data, grad_sample="single")
    assert strategy.ledger.num_steps == 2
    assert "objective" not in strategy.privacy_statement()


class _Twice(torch.autograd.Function):
    """Uses a parameter without a word, and draws a number, so that it cannot run again for each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight.sum() + 0 * torch.rand(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] * weight.sum(), (grads[0] * x).sum() * torch.ones_like(weight)
