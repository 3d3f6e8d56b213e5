"""The way in which samples run where a step takes gradients within itself, or sends records to layers by their data."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.trial import NUM_SPREAD
from tests.helpers import make_trainer
from tests.strategies.test_ways import CLASSES, FEATURES, NUM, Model, data, fit


class Meta(Model):
    """Also a gradient of its head by ``torch.func``, which counts for nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden, heads = x @ self.weight, dict(self.head.named_parameters())
        inner = torch.func.grad(lambda p: torch.func.functional_call(self.head, p, (hidden.detach(),)).sum())(heads)
        return F.cross_entropy(self.head(hidden), y, reduction="none") + 0 * sum(one.sum() for one in inner.values())


class SizesOfGradients(Model):
    """The loss of a record is the size of a gradient by ``torch.func``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden, heads = batch[0] @ self.weight, dict(self.head.named_parameters())

        def inner(heads: Any, row: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.head, heads, (row[None],)), label[None])

        inners = [torch.func.grad(inner)(heads, *each) for each in zip(hidden, batch[1], strict=True)]
        return torch.stack([torch.stack([one.square().sum() for one in each.values()]).sum() for each in inners])


@pytest.mark.slow
def test_gradients_by_torch_func_run_alone_if_they_count() -> None:
    assert not fit(Meta()).strategy.state.runs_alone
    assert fit(SizesOfGradients()).strategy.state.runs_alone


class InnerLoop(Model):
    """Each record moves the weight by a gradient step before its loss, as in meta-learning."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = []
        for x, y in zip(batch[0], batch[1], strict=True):
            loss = F.cross_entropy(self.head(x @ self.weight), y)
            (moved,) = torch.autograd.grad(loss, [self.weight], create_graph=True)
            losses.append(F.cross_entropy(self.head(x @ (self.weight - 0.1 * moved)), y))
        return torch.stack(losses).mean()


@pytest.mark.slow
def test_inner_loops_of_meta_learning_run_one_at_a_time() -> None:
    assert fit(InnerLoop()).strategy.state.runs_alone
    with pytest.raises(PrivacyError, match=r"^Expected gradients of data within a step, got those of 'weight'"):
        fit(InnerLoop(), grad_sample="rules")


class ByHand(Model):
    """Adds the gradients of two losses by itself, as a step that compares the gradients of tasks does."""

    def __init__(self, *, projects: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.projects = False, projects
        self.released: list[Tensor] = []

    def by_hand(self, batch: Any) -> list[Tensor]:
        logits, weights = self.head(batch[0] @ self.weight), [*self.parameters()]
        task = torch.autograd.grad(F.cross_entropy(logits, batch[1]), weights, retain_graph=True)
        other = torch.autograd.grad(logits.square().mean(), weights)
        share = sum((a * b).sum() for a, b in zip(task, other, strict=True)) if self.projects else 1.0
        return [a + share * b for a, b in zip(task, other, strict=True)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for parameter, gradient in zip(self.parameters(), self.by_hand(batch), strict=True):
            parameter.grad = gradient
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.released = [parameter.grad.clone() for parameter in self.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("projects", [False, True])
def test_gradients_written_by_hand_are_those_of_records(projects: bool) -> None:
    module, records = ByHand(projects=projects), TensorDataset(*(tensor[:8] for tensor in data().tensors))
    options: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.2,
        "sampling": "shuffle",
        "target_delta": 1e-3,
    }
    if projects:
        with pytest.raises(PrivacyError, match="samples influence each other"):
            make_trainer(DPStrategy(**options), None).fit(module, DataLoader(records, batch_size=8))
        options["grad_sample"] = "single"  # each record's own gradient counts
    alone = [module.by_hand([tensor[None] for tensor in record]) for record in records]
    norms = [torch.cat([gradient.flatten() for gradient in one]).norm() for one in alone]
    factors = [min(1.0, 0.2 / float(norm)) / 8 for norm in norms]
    expected = [sum(g * f for g, f in zip(each, factors, strict=True)) for each in zip(*alone, strict=True)]
    strategy = DPStrategy(**options)
    make_trainer(strategy, None, max_epochs=1).fit(module, DataLoader(records, batch_size=8))
    assert strategy.state.runs_alone is not projects
    torch.testing.assert_close(module.released, expected, rtol=1e-4, atol=1e-7)


class Experts(L.LightningModule):
    """Sends each record to one of several layers, by the record; the first two records choose alike by chance."""

    def __init__(self, alike: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers, self.alike = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(3)), alike

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = x.new_zeros(len(x), CLASSES)
        for index, layer in enumerate(self.layers):
            at = (x[:, 0].long() == index).nonzero(as_tuple=True)[0]
            if len(at) or self.alike == "one expert":
                out = out.index_add(0, at, layer(x[at]))
        return F.cross_entropy(out, y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("alike", ["one expert", "one branch"])
def test_records_that_choose_alike_by_chance_are_followed(alike: str) -> None:
    x, y = torch.rand(NUM, FEATURES), torch.arange(NUM) % CLASSES
    x[:, 0] = torch.arange(NUM) % 3 + 0.5
    first = np.random.default_rng(0).choice(NUM, NUM_SPREAD, replace=False)[:2]  # those that show the layout
    x[first.tolist(), 0] = 0.5
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, None, max_epochs=2).fit(Experts(alike), DataLoader(TensorDataset(x, y), batch_size=6))
    assert "checked on a few records" in strategy.privacy_statement()
    assert "one sample runs at a time" not in strategy.privacy_statement()
