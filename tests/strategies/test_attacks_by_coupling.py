"""Losses and batches in which samples would influence each other: refused."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_dataset, make_loader, make_trainer
from tests.strategies.test_attacks import attack, cross_entropy, fit

# ---------------------------------------------------------------- E: coins of a batch


def mixed(features: Tensor, share: float = 0.5) -> Tensor:
    return share * features + (1 - share) * features.roll(1, 0)


def coin_of_python(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if random.random() < 0.1 else batch[0], batch[1]])


def coin_of_python_high(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if random.random() > 0.9 else batch[0], batch[1]])


def coin_of_numpy(module: Any, batch: Any) -> Tensor:
    chance = np.random.rand()  # noqa: NPY002
    return cross_entropy(module, [mixed(batch[0]) if chance < 0.15 else batch[0], batch[1]])


def coin_of_torch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if torch.rand(()) < 0.1 else batch[0], batch[1]])


def coin_of_torch_high(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if float(torch.rand(1)) > 0.85 else batch[0], batch[1]])


def coin_of_bernoulli(module: Any, batch: Any) -> Tensor:
    mixes = bool(torch.bernoulli(torch.tensor(0.2)))
    return cross_entropy(module, [mixed(batch[0]) if mixes else batch[0], batch[1]])


def coin_of_randint(module: Any, batch: Any) -> Tensor:
    mixes = int(torch.randint(0, 5, ())) == 4
    return cross_entropy(module, [mixed(batch[0]) if mixes else batch[0], batch[1]])


def mean_over_masked_entries(module: Any, batch: Any) -> Tensor:
    """As masked language models do: a mean over whatever the coins of all samples chose."""
    chosen = torch.full(batch[0].shape, 0.4).bernoulli().bool()
    outputs = (module(batch[0]).sum(1, keepdim=True) - batch[0]).square()
    return outputs[chosen].mean()


def mean_over_uniformly_masked_entries(module: Any, batch: Any) -> Tensor:
    chosen = torch.rand(batch[0].shape) < 0.4
    outputs = (module(batch[0]).sum(1, keepdim=True) - batch[0]).square()
    return (outputs * chosen).sum() / chosen.sum().clamp(min=1)


COINS = [
    coin_of_python,
    coin_of_python_high,
    coin_of_numpy,
    coin_of_torch,
    coin_of_torch_high,
    coin_of_bernoulli,
    coin_of_randint,
    mean_over_masked_entries,
    mean_over_uniformly_masked_entries,
]


@pytest.mark.parametrize("step", COINS, ids=lambda step: step.__name__)
@pytest.mark.one_in(4)
def test_a_coin_that_mixes_a_batch_is_refused(step: Any, tmp_path: Any) -> None:
    with pytest.raises(
        PrivacyError, match=r"influence each other|its gradient when run alone|a mean over entries that draws choose"
    ):
        fit(attack(step)(), tmp_path)


@pytest.mark.parametrize("where", ["collate", "transfer"])
@pytest.mark.one_in(2)
def test_a_coin_that_mixes_before_the_step_is_refused(where: str, tmp_path: Any) -> None:
    def collate(samples: list[Any]) -> Any:
        features, labels = torch.utils.data.default_collate(samples)
        return [mixed(features) if where == "collate" and random.random() < 0.1 else features, labels]

    class Mixing(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [mixed(batch[0]) if where == "transfer" and torch.rand(()) < 0.1 else batch[0], batch[1]]

    with pytest.raises(PrivacyError, match="influence each other"):
        fit(Mixing(), tmp_path, DataLoader(make_dataset(), batch_size=16, collate_fn=collate))


# ---------------------------------------------------------------- F: couplings that three samples do not show


def hardest_of_many(module: Any, batch: Any) -> Tensor:
    losses = cross_entropy(module, batch, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.sum() / len(losses) if len(losses) > 10 else losses.mean()


def capacity(module: Any, batch: Any) -> Tensor:
    """Each class takes 12 samples at most; the rest is dropped."""
    losses = cross_entropy(module, batch, reduction="none")
    order = nn.functional.one_hot(batch[1], NUM_CLASSES).cumsum(0).gather(1, batch[1][:, None])[:, 0]
    return (losses * (order <= 4)).mean()


def guard_against_nan(module: Any, batch: Any) -> Any:
    loss = cross_entropy(module, batch)
    return None if torch.isnan(loss) else loss


def nan_to_num_of_the_batch(module: Any, batch: Any) -> Tensor:
    return torch.nan_to_num(cross_entropy(module, batch))


def clamp_of_the_batch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch).clamp(max=20.0)


def small_auxiliary_loss(module: Any, batch: Any) -> Tensor:
    outputs = module(batch[0])
    return nn.functional.cross_entropy(outputs, batch[1]) + 1e-3 * outputs.mean(0).square().sum()


def sign_of_the_batch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * torch.sign(batch[0].detach().sum() + 1e-9)


def far_below(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * (0.1 if bool((batch[0] < -50).any()) else 1.0)


def empty_record(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * (0.1 if bool((batch[0] == 0).all(1).any()) else 1.0)


def large_batches(module: Any, batch: Any) -> Tensor:
    """As many samples as Poisson sampling draws now and then."""
    return cross_entropy(module, [batch[0] - batch[0].mean(0) if len(batch[0]) > 40 else batch[0], batch[1]])


def unobserved_scaled_by_the_batch(module: Any, batch: Any) -> Tensor:
    """A record of zeros, of which none is in the data, gets the means of the others."""
    x, y = batch
    return cross_entropy(module, [torch.where((x == 0).all(1, keepdim=True), x.mean(0), x), y])


def missing_filled_up_from_the_batch(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(module, [torch.where(x.isnan(), x.nanmean(0), x), y])


COUPLINGS = [
    unobserved_scaled_by_the_batch,
    missing_filled_up_from_the_batch,
    hardest_of_many,
    far_below,
    empty_record,
    large_batches,
    capacity,
    guard_against_nan,
    nan_to_num_of_the_batch,
    clamp_of_the_batch,
    small_auxiliary_loss,
    sign_of_the_batch,
]


@pytest.mark.parametrize("step", COUPLINGS, ids=lambda step: step.__name__)
@pytest.mark.one_in(2)
def test_a_weak_or_rare_coupling_is_refused(step: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"influence each other|when run alone"):
        fit(attack(step)(), tmp_path, make_loader(batch_size=32))


def test_a_scale_of_the_batch_for_unobserved_records_is_found(tmp_path: Any) -> None:
    """None is in the data, and only a record that is unobserved but in one of its parts shows the coupling."""

    class Scaled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, observed, weight, y = batch
            scale = torch.where(observed > 0, x.abs().mean(1), x.abs().mean())
            losses = cross_entropy(self, [x / scale[:, None], y], reduction="none")
            return (losses * weight).mean()

    x, y = make_dataset().tensors
    data = TensorDataset(x, torch.ones(len(x)), torch.ones(len(x)), y)
    with pytest.raises(PrivacyError, match="exchanged next to one with missing values"):
        fit(Scaled(), tmp_path, DataLoader(data, batch_size=32))


@pytest.mark.parametrize("since", [1, 9])
@pytest.mark.one_in(2)
def test_a_coupling_that_begins_later_is_found(since: int, tmp_path: Any) -> None:
    class Later(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features = batch[0] - batch[0].mean(0) if self.global_step >= since else batch[0]
            return cross_entropy(self, [features, batch[1]])

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match="influence each other"):
        make_trainer(strategy, tmp_path, max_epochs=4).fit(Later(), make_loader())
    assert strategy.ledger.num_steps == since


# ---------------------------------------------------------------- G: rows dealt to the wrong samples


class Sets(Dataset):
    """Each record is a set of 1 to 4 rows."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1 + index % 4, NUM_FEATURES, generator=generator)


def joined(samples: list[Tensor]) -> Any:
    owners = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s) for s in samples]))
    return torch.cat(samples), lambda: owners, len(samples)


class OfSets(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, owners, count = batch
        outputs = torch.zeros(count, NUM_CLASSES).index_add(0, owners(), self(rows))
        return outputs.square().sum(1).mean()


def test_sets_of_different_size_run_one_at_a_time(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can tell whose rows ``index_add`` joins, as no tensor of the batch says it; a set alone owns all of them.
    Its size is not logged.
    """
    loader = DataLoader(Sets(), batch_size=8, collate_fn=joined)
    with pytest.raises(PrivacyError, match="Give it one batch axis"):
        fit(OfSets(), tmp_path, loader, grad_sample="rules")
    caplog.set_level(logging.INFO)
    assert fit(OfSets(), tmp_path, loader).state.runs_alone
    (said,) = [record.message for record in caplog.records if "Samples run one at a time" in record.message]
    assert "is no multiple of the batch size: # of #, # of #" in said
    assert "'network.0.weight'" in said


def test_a_collate_function_that_drops_records_is_refused(tmp_path: Any) -> None:
    def dropping(samples: list[Any]) -> Any:
        kept = [sample for sample in samples if float(sample[0][0]) < 1.2] or samples[:1]
        return torch.utils.data.default_collate(kept)

    with pytest.raises(PrivacyError, match="drops or adds records"):
        fit(Classifier(), tmp_path, DataLoader(make_dataset(), batch_size=16, collate_fn=dropping), epochs=3)
