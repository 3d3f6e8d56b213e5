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


class InAMetric(Tagger):
    """Adds to a state that was made before, as metrics do, and divides by a count of equal lengths."""

    zero = torch.zeros((), dtype=torch.float64)

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        total = self.zero.detach().clone().to(hidden.dtype) + self.losses(hidden, labels)[counted].sum()
        return total / (self.zero.clone() + torch.full((len(labels),), labels.shape[1]).sum())


class Smoothed(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        weight = torch.linspace(1, 2, VOCABULARY, dtype=hidden.dtype)
        rows, wanted = self.head(hidden)[counted], labels[counted]
        return F.cross_entropy(rows, wanted, weight=weight, ignore_index=3, label_smoothing=0.1)


class Filtered(Tagger):
    """Numbers of a record choose among its rows, and count them."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        losses = self.losses(hidden, labels)[counted]
        return losses[losses <= losses.mean()].sum(0) / counted.sum((0, 1)) * (1 + (labels == 4).any())


class Weighted(Tagger):
    """A trained number weighs the loss of each record."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return super().loss(hidden, labels, counted) * torch.exp(-self.log_scale) + self.log_scale


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


KINDS = [
    InAMetric, Tagger, OfHidden, OfFlatRows, OfPlaces, OfLosses, SumsOfLosses, SharesOfLosses, Smoothed, Filtered,
    Weighted,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(3)
def test_a_step_is_that_of_a_loop_over_records(
    kind: type[Tagger], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check_step(Case(kind, tagged, {"per_sample_loss": True}), tmp_path)
    assert not [r for r in caplog.records if "runs alone" in r.message]


class TwoTerms(Tagger):
    """The second term counts a record whose labels are all missing, as its loss alone does."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        second = hidden.square().mean()
        return second + self.losses(hidden, labels)[counted].mean() if counted.any() else second


def weights(module: Tagger, data: TensorDataset, tmp_path: Any, *, batch_size: int, **options: Any) -> Tensor:
    """Return the weights after three passes without noise."""
    settings: Any = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "per_sample_loss": True, "seed": 5, **options}
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size)
    make_trainer(DPStrategy(**settings), tmp_path, max_epochs=3).fit(module, loader)
    return torch.cat([each.detach().flatten() for each in module.parameters()])


class OfSelected(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        rows = self.head(hidden).masked_select(counted[..., None]).view(-1, VOCABULARY)
        return F.cross_entropy(rows, labels.masked_select(counted))


@pytest.mark.parametrize("kind", [Tagger, TwoTerms, OfSelected])
def test_few_labels_of_few_records_count_as_alone(
    kind: type[Tagger], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of one record, of one row, and of none come up."""
    caplog.set_level(logging.INFO)
    words = token_ids()
    labels = words.masked_fill(torch.eye(NUM_SAMPLES, dtype=torch.bool).logical_not(), -100)
    labels[::3] = -100
    found = []
    for grad_sample in ("auto", "single"):
        torch.manual_seed(0)
        data = TensorDataset(words, labels)
        found.append(weights(kind(), data, tmp_path, batch_size=2, grad_sample=grad_sample))
    assert found[0].isfinite().all()
    assert not [r for r in caplog.records if "runs alone" in r.message]
    torch.testing.assert_close(*found)


class AtPlaces(Tagger):
    """A record without labels has a loss too."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        places = torch.where(counted.all(1))[0]
        second = self.head(hidden).square().mean()
        return second + self.losses(hidden, labels)[places].mean() if len(places) else second


def test_places_of_labels_that_one_record_has(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One record has labels, and the first checks do not meet it."""
    caplog.set_level(logging.INFO)
    words = token_ids().repeat(5, 1)
    labels = words.masked_fill(torch.arange(len(words))[:, None] != 5, -100)
    found = []
    for grad_sample in ("auto", "single"):
        torch.manual_seed(0)
        found.append(weights(AtPlaces(), TensorDataset(words, labels), tmp_path, batch_size=8, grad_sample=grad_sample))
    assert not [r for r in caplog.records if "runs alone" in r.message]
    torch.testing.assert_close(*found)


class OfOthers(Tagger):
    """Labels of other records choose among the rows of a record, which full records do not show."""

    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return super().loss(hidden, labels, counted.flip(0))


class OfAll(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return super().loss(hidden, labels, counted & counted.all(0))


class ByPlacesOfOthers(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        rows, places = counted.flip(0).nonzero(as_tuple=True)
        return F.cross_entropy(self.head(hidden)[rows, places], labels[rows, places]) + super().loss(
            hidden, labels, counted
        )


class ByAFigureOfAll(Tagger):
    def loss(self, hidden: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return super().loss(hidden, labels, counted) * (1 + (labels < 0).flatten().cumsum(0)[-1])


@pytest.mark.parametrize("kind", [OfOthers, OfAll, ByPlacesOfOthers, ByAFigureOfAll])
def test_rows_that_others_choose_run_alone(kind: type[Tagger], tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    words = token_ids().clamp(min=1)
    weights(kind(), TensorDataset(words, words), tmp_path, batch_size=NUM_SAMPLES)
    assert [r for r in caplog.records if "other" in r.message and "Each record runs alone" in r.message]


def test_a_mean_over_all_rows_beside_own_losses_runs_alone(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_step(Case(Shared, tagged, {"per_sample_loss": True}), tmp_path)
    assert [r for r in caplog.records if "Each record runs alone" in r.message]


def test_without_own_losses_the_shared_count_is_refused(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match="per_sample_loss=True"):
        make_trainer(DPStrategy(noise_multiplier=1.0, target_delta=1e-3), tmp_path).fit(
            Tagger(), torch.utils.data.DataLoader(tagged(), batch_size=4)
        )
