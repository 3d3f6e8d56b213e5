"""Records that a mask leaves unequally many rows of have their own loss in a batch: their owners are followed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import make_trainer
from tests.strategies.model_cases import Case
from tests.strategies.tasks import NUM_SAMPLES, VOCABULARY, WIDTH, Task, token_ids
from tests.strategies.test_models import check_step


class Tagger(Task):
    """A label for each token; labels of what fills a record up are not counted."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        words, labels = batch
        return self.loss(self(words), labels, labels >= 0)

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden)[counted], labels[counted])

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).mT, labels.clamp(min=0), reduction="none")


class OfHidden(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden[counted]), labels[counted])


class OfFlatRows(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        rows = self.head(hidden).flatten(0, 1)[counted.flatten()]
        return F.cross_entropy(rows, labels.flatten()[counted.flatten()])


class OfPlaces(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        places = counted.flatten().nonzero().squeeze(1)
        return F.cross_entropy(self.head(hidden).flatten(0, 1)[places], labels.flatten()[places])


class OfLosses(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return self.losses(hidden, labels)[counted].mean()


class SumsOfLosses(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return self.losses(hidden, labels).masked_select(counted).sum() / counted.sum()


class SharesOfLosses(Tagger):
    """The denominator meets rows, not a scalar."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return (self.losses(hidden, labels)[counted] / counted.sum().sqrt()).sum()


class Smoothed(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        weight = torch.linspace(1, 2, VOCABULARY, dtype=hidden.dtype)
        rows, wanted = self.head(hidden)[counted], labels[counted]
        return F.cross_entropy(rows, wanted, weight=weight, ignore_index=3, label_smoothing=0.1)


class Shared(Tagger):
    """Also subtracts a mean of the whole batch, so that no record has a loss of its own."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        rows = self.head(hidden)[counted]
        return F.cross_entropy(rows - rows.detach().mean(0), labels[counted])


def tagged(*, without: int = NUM_SAMPLES) -> TensorDataset:
    """Records of which each has one labelled word more than the one before; one may have none."""
    words = token_ids()
    labels = words.masked_fill(torch.arange(words.shape[1]) > torch.arange(NUM_SAMPLES)[:, None], -100)
    labels[without : without + 1] = -100
    return TensorDataset(words, labels)


KINDS = [Tagger, OfHidden, OfFlatRows, OfPlaces, OfLosses, SumsOfLosses, SharesOfLosses, Smoothed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(2)
def test_a_step_is_that_of_a_loop_over_records(
    kind: type[Tagger], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check_step(Case(kind, tagged, {"per_sample_loss": True}), tmp_path)
    assert not [r for r in caplog.records if "runs alone" in r.message]


def test_a_record_that_the_mask_leaves_nothing_of_adds_nothing(tmp_path: Any) -> None:
    found = []
    for grad_sample in ("auto", "single"):
        torch.manual_seed(0)
        module = Tagger()
        strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=0.1, per_sample_loss=True, grad_sample=grad_sample)
        trainer = make_trainer(strategy, tmp_path, max_epochs=3)
        trainer.fit(module, torch.utils.data.DataLoader(tagged(without=4), batch_size=NUM_SAMPLES))
        found.append(torch.cat([each.flatten() for each in module.parameters()]))
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found)


def test_a_mean_over_all_rows_beside_own_losses_runs_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_step(Case(Shared, tagged, {"per_sample_loss": True}), tmp_path)
    assert [r for r in caplog.records if "Each record runs alone" in r.message]


def test_without_own_losses_the_shared_count_is_refused(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="per_sample_loss=True"):
        make_trainer(DPStrategy(noise_multiplier=1.0, target_delta=1e-3), tmp_path).fit(
            Tagger(), torch.utils.data.DataLoader(tagged(), batch_size=4)
        )
