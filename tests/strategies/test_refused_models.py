"""Modules whose samples meet, or which no rule follows, are refused before a release."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import make_trainer
from tests.strategies.model_cases import CASES, Case, classifier, tokens, vectors
from tests.strategies.models import Apply, mlp
from tests.strategies.tasks import NUM_CLASSES, NUM_SAMPLES, VOCABULARY, WIDTH, Task
from tests.strategies.test_models import Opaque, _own_weights, check_step

__all__ = ["_own_weights"]

# ---------------------------------------------------------------- what is refused


class Contrastive(Task):
    """Each record against the others of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ self(batch[0] + 0.1).T, torch.arange(len(z)))


class TokenMean(Task):
    """The mean over all tokens of the batch, of which some records have more than others."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = batch[0]
        return F.cross_entropy(self(ids)[:, :-1].mT, ids[:, 1:], ignore_index=0)


class ClassWeights(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.arange(1.0, NUM_CLASSES + 1))


class Mixup(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        return F.cross_entropy(self(0.7 * x + 0.3 * x[torch.randperm(len(x))]), targets)


class Penalised(Task):
    """A loss with a penalty on weights, after the mean over the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1]) + self.network[0].weight.square().sum()


class MeanOfSquares(Task):
    """Divides by the root of the batch size."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum") / len(batch[0]) ** 0.5


RULES = {"grad_sample": "rules"}
TOGETHER, SCALED = "samples influence each other", "samples share a denominator"
REFUSED: dict[str, tuple[Case, str]] = {
    "batch norm": (
        classifier(lambda: mlp(nn.BatchNorm1d(WIDTH)), vectors),
        r"BatchNorm1d normalises .*lightning_dp.fix",
    ),
    "statistics of the batch": (classifier(lambda: mlp(Apply(lambda x: x - x.mean(0))), vectors), TOGETHER),
    "softmax over the batch": (classifier(lambda: mlp(Apply(lambda x: x.softmax(0))), vectors), TOGETHER),
    "neighbours in the batch": (classifier(lambda: mlp(Apply(lambda x: x.roll(1, 0) + x)), vectors), TOGETHER),
    "contrastive loss": (Case(lambda: Contrastive(mlp()), vectors), TOGETHER),
    "mixup": (Case(lambda: Mixup(mlp()), vectors), TOGETHER),
    "mean over tokens": (Case(lambda: TokenMean(CASES["tied language model"].module().network), tokens), SCALED),
    "class weights": (Case(lambda: ClassWeights(mlp()), vectors), SCALED),
    "sum taken for a mean": (
        CASES["sum of losses"]._replace(options={"loss_reduction": "mean"}),
        "not a mean. Pass loss_reduction='sum'",
    ),
    "root of the batch size": (
        Case(lambda: MeanOfSquares(mlp()), vectors),
        "something that depends on the batch's size",
    ),
    "mean taken for a sum": (
        CASES["linear"]._replace(options={"loss_reduction": "sum"}),
        "something that depends on the batch's size",
    ),
    "function of autograd": (
        classifier(Opaque, vectors)._replace(options=RULES),
        r"another use for \['network\.weight'\]: the torch\.autograd\.Function Hidden.*register_rule.*'single'",
    ),
    "penalty on weights": (
        Case(lambda: Penalised(mlp()), vectors, RULES),
        r"'sum\(square\(network\.0\.weight\)\)' to meet tensors with a batch axis.*weight_decay",
    ),
    "embedding with max_norm": (
        classifier(
            lambda: nn.Sequential(nn.Embedding(VOCABULARY, NUM_CLASSES, max_norm=1.0), Apply(lambda x: x.mean(1))),
            tokens,
        ),
        "max_norm changes the weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.one_in(2)
def test_modules_not_private_are_refused_before_a_release(tmp_path: Any, name: str) -> None:
    case, message = REFUSED[name]
    module = case.module()
    before = copy.deepcopy(module.state_dict())
    strategy = DPStrategy(noise_multiplier=1.0, **case.options)
    trainer = make_trainer(strategy, tmp_path)
    with pytest.raises(PrivacyError, match=message):
        trainer.fit(module, DataLoader(case.dataset(), batch_size=NUM_SAMPLES))
    assert strategy.ledger.num_steps == 0
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 1}], ids=str)
@pytest.mark.parametrize("name", ["function of autograd", "penalty on weights"])
def test_samples_run_alone_need_no_support(tmp_path: Any, name: str, settings: dict[str, Any]) -> None:
    """What rules refuse for want of per-sample gradients trains with one sample at a time, by itself too."""
    check_step(REFUSED[name][0]._replace(options={}), tmp_path, **settings)
