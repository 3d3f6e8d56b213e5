"""What happens once before the first step: nothing of it may leave a trace, and what mixes samples is found."""

from __future__ import annotations

import logging
import math
import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_loader, make_trainer


class Traced(Classifier):
    """Counts, collects, logs, draws and keeps buffers, as training steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.outputs: list[Any] = []
        self.seen: dict[Any, Any] = {}
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.register_buffer("average", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)
        self.state_at_first_step: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        if not self.trainer.strategy.is_on_trial and not self.state_at_first_step:
            self.state_at_first_step = {
                "calls": self.calls,
                "outputs": len(self.outputs),
                "seen": dict(self.seen),
                "average": float(self.average),
                "metric": int(self.accuracy.tp.sum()),
                "logged": dict(self.trainer.callback_metrics),
                "draw": float(torch.rand(())),
            }
        self.calls += 1
        self.outputs.append(features)
        self.seen[self.calls] = True
        self.average += 1
        logits = self(self.dropout(features))
        self.accuracy(logits, labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        random.random()
        np.random.random()  # noqa: NPY002
        return loss


def test_checks_leave_no_trace(tmp_path: Any) -> None:
    module = Traced()
    strategy = DPStrategy(noise_multiplier=1.0)
    trainer = make_trainer(strategy, tmp_path, limit_train_batches=1)
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    trainer.fit(module, make_loader(batch_size=32))
    torch.manual_seed(9)
    before = {"calls": 0, "outputs": 0, "seen": {}, "average": 0.0, "metric": 0, "logged": {}}
    assert {name: module.state_at_first_step[name] for name in before} == before
    assert (module.calls, len(module.outputs)) == (1, 1)
    random.seed(9)
    after_one = random.random()
    assert after_one != random.random()


class Centred(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        return nn.functional.cross_entropy(self(features - features.mean(0)), labels)


class Contrastive(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        codes = self(batch[0])
        return nn.functional.cross_entropy(codes @ codes.T, torch.arange(len(codes)))


class Mixup(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        torch.manual_seed(0)
        mixed = 0.5 * features + 0.5 * features[torch.randperm(len(features))]
        return nn.functional.cross_entropy(self(mixed), labels)


class Summed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Weighted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([1.0, 2.0, 5.0])
        return nn.functional.cross_entropy(self(batch[0]), batch[1], weight=weight)


@pytest.mark.parametrize("module", [Centred, Contrastive, Mixup, Weighted])
def test_losses_that_mix_samples_are_refused_at_first(tmp_path: Any, module: type) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="network"):
        make_trainer(strategy, tmp_path).fit(module(), make_loader())
    assert strategy.ledger.num_steps == 0


def test_a_sum_is_named_and_can_be_declared(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="sum"):
        make_trainer(DPStrategy(noise_multiplier=1.0, loss_reduction="mean"), tmp_path).fit(Summed(), make_loader())
    strategy = DPStrategy(noise_multiplier=1.0, loss_reduction="sum")
    make_trainer(strategy, tmp_path).fit(Summed(), make_loader())
    assert strategy.ledger.num_steps == 4


DRAWS: dict[str, Any] = {
    "normal": torch.randn_like,
    "uniform": torch.rand_like,
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "gumbel": lambda x: nn.functional.gumbel_softmax(x, tau=0.7),
    "hard gumbel": lambda x: nn.functional.gumbel_softmax(x, hard=True),
    "exponential": lambda x: torch.empty_like(x).exponential_(2.0),
    "cauchy": lambda x: torch.empty_like(x).cauchy_().tanh(),
    "log normal": lambda x: torch.empty_like(x).log_normal_(),
    "geometric": lambda x: torch.empty_like(x).geometric_(0.3),
    "poisson": lambda x: torch.poisson(x.detach().exp()),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 5.0), x.detach().sigmoid()),
    "gamma": lambda x: torch.distributions.Gamma(x.exp() + 0.5, 1.0).rsample(),
    "beta": lambda x: torch.distributions.Beta(x.exp() + 0.5, 2.0).rsample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(x.exp() + 0.5).rsample(),
    "categorical": lambda x: torch.distributions.Categorical(logits=x.detach()).sample().unsqueeze(1),
    "places": lambda x: torch.multinomial(x.detach().exp(), 2).sum(1, keepdim=True),
    "places in a table": lambda x: torch.multinomial(torch.arange(1.0, 9.0), 2 * len(x), True).view(-1, 2)[:, :1],
    "student": lambda x: torch.distributions.StudentT(3.0 + x.exp()).rsample().tanh(),
    "laplace": lambda x: torch.distributions.Laplace(x, 1.0).rsample(),
    "relaxed coin": lambda x: torch.distributions.RelaxedBernoulli(torch.tensor(0.5), logits=x).rsample(),
}


@pytest.mark.parametrize("names", [[*DRAWS][::2], [*DRAWS][1::2]], ids=", ".join)
def test_steps_that_draw_are_not_mistaken_for_steps_that_mix(tmp_path: Any, names: list[str]) -> None:
    class Drawing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.network[1](self.network[0](batch[0]))
            drawn = [DRAWS[name](hidden).expand_as(hidden) for name in names]
            return nn.functional.cross_entropy(self.network[2](hidden + torch.stack(drawn).mean(0)), batch[1])

    strategy = DPStrategy(noise_multiplier=1.0)
    make_trainer(strategy, tmp_path).fit(Drawing(), make_loader())
    assert strategy.ledger.num_steps == 4


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.one_in(2)
def test_partners_that_are_drawn_by_weight_are_refused(tmp_path: Any, rows: bool, replacement: bool) -> None:
    class Partners(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = torch.ones(len(batch[0]))
            drawn = torch.multinomial(weights[None] if rows else weights, len(weights), replacement).flatten()
            return nn.functional.cross_entropy(self(batch[0] + 0.5 * batch[0][drawn]), batch[1])

    strategy = DPStrategy(noise_multiplier=1.0)
    with pytest.raises(PrivacyError):
        make_trainer(strategy, tmp_path).fit(Partners(), make_loader())
    assert strategy.ledger.num_steps == 0


def test_frozen_draws_are_constant_and_permutations_mix() -> None:
    torch.manual_seed(0)
    with FrozenRandomness():
        assert torch.equal(torch.randn(4), torch.full((4,), 0.5))
        assert torch.equal(torch.empty(3).uniform_(2.0, 4.0), torch.full((3,), 3.0))
        assert torch.equal(torch.normal(torch.ones(3), 2.0), torch.full((3,), 2.0))
        assert torch.equal(torch.randint(3, 9, (5,)), torch.full((5,), 3))
        assert torch.equal(nn.functional.dropout(torch.ones(50), 0.5), torch.ones(50))
        assert torch.equal(torch.bernoulli(torch.full((3,), 0.25)), torch.full((3,), 0.25))
        assert torch.randperm(4).tolist() == [1, 2, 3, 0]
        assert torch.equal(torch.empty(2).exponential_(2.0), torch.full((2,), math.log(2.0) / 2.0))
        assert torch.equal(torch.empty(2).geometric_(0.3), torch.full((2,), 2.0))
        assert torch.multinomial(torch.tensor([[0.0, 1.0, 1.0], [8.0, 1.0, 0.0]]), 1).tolist() == [[1], [0]]
        assert sorted(torch.multinomial(torch.tensor([[0.0, 1.0, 2.0]]), 2)[0].tolist()) == [1, 2]
    assert torch.randn(4).std() > 0
    with FrozenRandomness(rates=True):
        for kept in (0.25, 0.81):
            torch.testing.assert_close(nn.functional.dropout(torch.ones(50), 1 - kept), torch.full((50,), kept**0.5))
            torch.testing.assert_close(torch.empty(3).bernoulli_(kept) / kept, torch.full((3,), kept**0.5))


def test_draws_frozen_by_column_are_those_of_any_row() -> None:
    for coin, low, high in ((0.02, 0.01, 0.03), (0.5, 0.0, 1.0), (0.98, 0.97, 0.99)):
        with FrozenRandomness(coin=coin, by_column=True):
            rows, alone = torch.rand(3, 40), torch.rand(1, 40)
            assert torch.equal(rows, alone.expand(3, 40))
            assert low < float(rows[0].min()) < float(rows[0].max()) < high
            assert torch.rand(4).unique().numel() == 1  # the samples may be along it


@pytest.mark.parametrize("mixes", [False, True])
def test_a_division_by_the_spread_of_noise_trains(tmp_path: Any, mixes: bool) -> None:
    """Equal draws would divide zero by zero."""

    class Ranged(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            hidden = self.network[1](self.network[0](batch[0]))
            noise = torch.randn(hidden.shape)
            noise = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
            hidden = hidden + noise + (0.1 * hidden.mean(0) if mixes else 0.0)
            return nn.functional.cross_entropy(self.network[2](hidden), batch[1])

    strategy = DPStrategy(noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="influence each other") if mixes else nullcontext():
        make_trainer(strategy, tmp_path).fit(Ranged(), make_loader())
    assert strategy.ledger.num_steps == (0 if mixes else 4)


def test_draws_frozen_by_place_show_how_many_rows_were_drawn() -> None:
    with FrozenRandomness(by_place=True):
        two, three = torch.randn(2, 1000), torch.randn(3, 1000)
        assert torch.equal(two, three[:2])
        assert torch.equal(torch.rand(5, 2, 3), torch.rand(5, 4, 3)[:, :2])  # samples along the second axis
        assert torch.rand(9, 8, 7).unique().numel() > 500
        assert abs(float(two.mean() - three.mean())) > 1e-3
        assert abs(float(three.mean())) < 0.1
        assert abs(float(three.std()) - 1) < 0.1
        assert torch.randint(0, 9, (200,)).unique().numel() == 9
        assert abs(float(torch.empty(1000).exponential_().mean()) - 1) < 0.1
        assert 0 < float(torch.rand(1000).min()) < float(torch.rand(1000).max()) < 1
    with FrozenRandomness(by_place=True, block=3):
        three = torch.rand(5, 6, 7)
    with FrozenRandomness(by_place=True, block=2):
        assert torch.equal(torch.rand(5, 4, 7), three[:, [0, 1, 3, 4]])  # two copies of two samples of three
    assert float((three[:, :3] - three[:, 3:]).abs().min()) > 0


def test_tiny_datasets_are_checked_as_far_as_they_go(tmp_path: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    for size in (1, 2):
        caplog.clear()
        strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
        make_trainer(strategy, tmp_path).fit(Classifier(), make_loader(size, batch_size=1))
        assert strategy.ledger.num_steps == size
        assert ("has one record, which the guarantee hides as a whole" in caplog.text) is (size == 1)


class Remembering(Classifier):
    """Centres its features by a running mean of what it has seen."""

    def __init__(self, *, persistent: bool = True, public: bool = False) -> None:
        super().__init__()
        self.public = public
        self.register_buffer("mean", torch.zeros(NUM_FEATURES), persistent=persistent)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        loss = nn.functional.cross_entropy(self(features - self.mean), labels)
        self.mean.mul_(0.9).add_(0.1 if self.public else 0.1 * features.mean(0))
        return loss


def test_a_running_mean_of_the_data_is_refused(tmp_path: Any) -> None:
    """It would be in every checkpoint, un-noised, as the statistics of BatchNorm would."""
    strategy, module = DPStrategy(noise_multiplier=1.0), Remembering()
    with pytest.raises(PrivacyError, match="leaves 'mean' with another value after another record"):
        make_trainer(strategy, tmp_path).fit(module, make_loader())
    assert strategy.ledger.num_steps == 0
    assert torch.equal(module.mean, torch.zeros(NUM_FEATURES))
    with pytest.raises(PrivacyError, match="what training_step saw before"):  # not saved, but later losses read it
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Remembering(persistent=False), make_loader())
    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Remembering(public=True), make_loader())
