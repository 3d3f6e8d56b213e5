"""Samples that influence each other are refused before they run one at a time, and so is what says too little."""

from __future__ import annotations

import logging
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.ways import _public
from tests.cases import each
from tests.helpers import make_trainer
from tests.strategies.test_ways import CLASSES, Model, Weighted, apart, data, fit, weights


class Augmented(Model):
    """Each row is scaled by a draw of Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(torch.stack([row * random.uniform(0.5, 2.0) for row in x]))
        out: Tensor = self.head((rows @ self.weight).tanh())
        return out


@pytest.mark.slow
def test_draws_of_python_for_each_row_are_no_coupling(caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    assert fit(Augmented()).strategy.ledger.num_steps == 3
    assert "one at a time" not in caplog.text


@pytest.mark.parametrize("name", ["mean", "neighbour", "sum of losses"])
@pytest.mark.one_in(3)
def test_coupling_next_to_draws_of_python_is_refused(name: str) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, reduction="sum" if name == "sum of losses" else "mean")

    mixes: dict[str, Any] = {"mean": lambda x: x - x.mean(0), "neighbour": lambda x: x + 0.05 * x.roll(1, 0)}
    with pytest.raises(PrivacyError, match=r"^Expected the gradient of every sample|Samples influence each other"):
        fit(Augmented(mixes.get(name), loss))


# ---------------------------------------------------------------- attacks: coupled samples must be refused


class Centred(torch.autograd.Function):
    """A mean over the batch that no rule sees into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] - grads[0].mean(0)


class Hiding(torch.autograd.Function):
    """A scale of the batch, which no argument of the function shows."""

    batch: Any = None

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * Hiding.batch.abs().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * Hiding.batch.abs().mean()


class Scaled(Model):
    """Scales its weight by the batch in a function of the weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        Hiding.batch = x
        out: Tensor = self.head((x @ Hiding.apply(self.weight)).tanh())
        return out


def contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(logits, dim=1)
    return F.cross_entropy(z @ z.T / 0.5, (torch.arange(len(z)) + 1) % len(z))


def hardest(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def denominator(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=torch.arange(1.0, CLASSES + 1))


def ranked(logits: Tensor, labels: Tensor) -> Tensor:
    return F.relu(1 - logits[:1] + logits[1:]).mean() if len(logits) > 1 else logits.square().mean()


def spread(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) - 0.1 * logits.var(0, unbiased=False).sum()


class Late(nn.Module):
    """Mixes samples only in batches of four and more."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) > 3 else x


ATTACKS: dict[str, Any] = {
    "batch norm by function": lambda: Model(
        lambda x: F.batch_norm(torch.stack([x, x], 2), None, None, training=True)[..., 0]
    ),
    "mean in a function of autograd": lambda: Model(Centred.apply),
    "softmax over the batch": lambda: Model(lambda x: x.softmax(0)),
    "neighbour": lambda: Model(lambda x: x + 0.05 * x.roll(1, 0)),
    "contrastive loss": lambda: Model(loss=contrastive),
    "hardest examples": lambda: Model(loss=hardest),
    "shared denominator": lambda: Model(loss=denominator),
    "ranking": lambda: Model(loss=ranked),
    "spread of the batch": lambda: Model(loss=spread),
    "sum under a constant": lambda: Model(loss=lambda x, y: F.cross_entropy(x, y, reduction="sum") / len(x) ** 0.5),
    "large batches alone": lambda: Model(Late()),
    "a rare coin": lambda: Model(lambda x: x - x.mean(0) if torch.rand(()) < 0.1 else x),
}


@pytest.mark.parametrize("sampling", ["shuffle", "poisson"])
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.one_in(5)
def test_coupling_next_to_an_unfollowed_use_is_refused(name: str, sampling: str) -> None:
    module = ATTACKS[name]()
    before = weights(module)
    with pytest.raises(PrivacyError, match=r"(?s)autograd\.Function.*samples influence each other"):
        fit(module, sampling=sampling)
    assert torch.equal(before, weights(module))


@pytest.mark.parametrize("sampling", ["shuffle", "poisson"])
def test_a_batch_hidden_in_a_function_of_weights_is_refused(sampling: str) -> None:
    with pytest.raises(PrivacyError, match="samples influence each other"):
        fit(Scaled(), sampling=sampling)


def test_batch_norm_is_refused_before_any_choice() -> None:
    with pytest.raises(PrivacyError, match="BatchNorm1d normalises with statistics of the batch"):
        fit(Model(nn.BatchNorm1d(5)))


def test_coupling_that_begins_later_is_refused() -> None:
    """The comparison is repeated at the second step."""

    class Later(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.mix = (lambda x: x - x.mean(0)) if self.trainer.global_step else (lambda x: x)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match="samples influence each other"):
        fit(Later())


class Hinge(Model):
    """A loss whose gradient is zero from some step on."""

    begins, reduction = 1, "mean"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        losses = (losses - 1e6 * (self.trainer.global_step >= self.begins)).relu()
        return losses.sum() if self.reduction == "sum" else losses.mean()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_zero_are_no_coupling_later(reduction: str, caplog: Any) -> None:
    module = Hinge()
    module.reduction = reduction
    caplog.set_level(logging.INFO)
    assert fit(module).strategy.ledger.num_steps == 3
    assert "Samples run one at a time" in caplog.text


def test_gradients_of_zero_before_the_first_step_say_too_little() -> None:
    module = Hinge()
    module.begins = 0
    with pytest.raises(PrivacyError, match="all zero are too little to tell"):
        fit(module)


@pytest.mark.parametrize("begins", [0, 1])
@pytest.mark.one_in(2)
def test_coupling_under_a_learned_weight_is_refused(begins: int) -> None:
    """The square of a mean loss; the losses of records, of which each would be squared, do not show it."""

    def mean(loss: Tensor, step: int) -> Tensor:
        return loss.mean() ** 2 if step >= begins else loss.mean()

    with pytest.raises(PrivacyError, match="samples influence each other"):
        fit(Weighted(apart, mean))


@pytest.mark.parametrize(
    ("num", "reduction", "match"),
    [(1, "mean", "1 record is too little to tell"), (9, "sum", "sum over the batch counts")],
)
def test_penalties_on_few_records_or_on_a_sum_are_refused(num: int, reduction: str, match: str) -> None:
    class Penalised(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.head(batch[0] @ self.weight)
            return F.cross_entropy(logits, batch[1], reduction=reduction) + self.weight.square().sum()

    few = TensorDataset(*(tensor[:num] for tensor in data().tensors))
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match=f"weight_decay.*{match}"):
        make_trainer(strategy, None).fit(Penalised(), DataLoader(few, batch_size=1))


def test_a_record_that_cannot_run_alone_is_refused() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if len(logits) == 1:
            raise ValueError("a metric over two records")
        return F.cross_entropy(logits, labels)

    with pytest.raises(PrivacyError, match=r"autograd\.Function.*Nor can a record run alone: a metric over two"):
        fit(Model(loss=loss))


def test_penalties_are_followed_where_a_record_cannot_run_alone() -> None:
    """As with a ``squeeze`` that drops the batch axis of one record, too."""

    class Penalised(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(batch[0]) == 1:
                raise ValueError("too few dimensions")
            return F.cross_entropy(self.head(batch[0] @ self.weight), batch[1]) + self.weight.square().sum()

    trainer = fit(Penalised())
    assert trainer.strategy.ledger.num_steps == 3
    assert not trainer.strategy.state.runs_alone


def test_reason_in_the_log_holds_no_number_of_records() -> None:
    reason = PrivacyError("differ by up to 0.33 of 12 (1e-5), 'network.0.weight', layer1, shape (3, 4).")
    assert _public(reason) == "differ by up to # of # (#), 'network.0.weight', layer1, shape (#, #)."


@each(
    "mix, loss, says",
    [
        (lambda x: x, F.cross_entropy, False),
        (lambda x: x, partial(F.cross_entropy, reduction="sum"), False),
        (lambda x: x - x.mean(0), F.cross_entropy, True),
    ],
)
def test_single_records_of_a_coupled_loss_are_another_objective(caplog: Any, mix: Any, loss: Any, says: bool) -> None:
    caplog.set_level(logging.INFO)
    caplog.clear()
    assert fit(Model(mix, loss), grad_sample="single").strategy.ledger.num_steps == 3
    assert ("Each record's own loss counts" in caplog.text) is says
