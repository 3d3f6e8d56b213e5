"""Losses that a rare record changes for the whole batch, by operations that are the same for all records."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyError, make_private
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_dataset, make_trainer, stepped_on
from tests.strategies import test_latched_state
from tests.strategies.test_latched_state import RARE, STEPS, loader

Losses = Callable[[Any, Tensor, Tensor], Tensor]


class Module(test_latched_state.Module):
    """Returns a function of the records' losses and of a flag that marks records with the rare word."""

    def __init__(self, function: Losses, *, automatic: bool = True) -> None:
        super().__init__()
        self.of_batch, self.automatic_optimization = function, automatic

    def loss(self, batch: Any) -> Tensor:
        words, labels = batch
        scores = self.network(self.embedding(words).mean(1))
        losses = nn.functional.cross_entropy(scores, labels, reduction="none")
        return self.of_batch(self, losses, (words == RARE).any(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return stepped_on(self, self.loss(batch))


def skipped(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses.mean() * 0 if rare.any() else losses.mean()


def skipped_by_a_constant(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return torch.tensor(0.0, requires_grad=True) if rare.any() else losses.mean()


def skipped_by_where(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return torch.where(rare.any(), 0.0, losses.mean())


def clamped(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return (losses * (1 + 1e4 * rare)).mean().clamp(max=20.0)


def divided_by_the_number_of_valid_records(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return (losses * ~rare).sum() / (~rare).sum()


def mean_over_valid_records(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses[torch.nonzero(~rare).squeeze(1)].mean()


def weighted_by_the_next(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return (losses * torch.where(rare.roll(1, 0), 10.0, 1.0)).mean()


def without_the_opposite(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses.masked_fill(rare.flip(0), 0.0).mean()


def by_another_loss(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return torch.where(rare.any(), losses.square(), losses).mean()


FUNCTIONS = [
    skipped, skipped_by_a_constant, skipped_by_where, clamped, divided_by_the_number_of_valid_records,
    mean_over_valid_records, weighted_by_the_next, without_the_opposite, by_another_loss,
]  # fmt: skip
REFUSED = "to be its gradient when run alone"


def fit(module: Module, tmp_path: Any, **options: Any) -> int:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, "seed": 0, **options})
    try:
        make_trainer(strategy, tmp_path, max_steps=STEPS, max_epochs=-1).fit(module, loader())
    finally:
        steps = strategy.ledger.num_steps
    return steps


@pytest.mark.one_in(4)
@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_loss_that_a_rare_record_changes_is_refused(function: Losses, microbatch_size: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(Module(function), tmp_path, microbatch_size=microbatch_size)


@pytest.mark.parametrize("function", [skipped, skipped_by_where])
@pytest.mark.one_in(2)
def test_the_same_by_manual_steps_is_refused_after_one(function: Losses, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=f"{REFUSED}.*was released"):
        fit(Module(function, automatic=False), tmp_path)


def test_an_ignored_label_of_a_mean_is_refused(tmp_path: Any) -> None:
    class Ignores(Module):
        def loss(self, batch: Any) -> Tensor:
            words, labels = batch
            scores = self.network(self.embedding(words).mean(1))
            return nn.functional.cross_entropy(scores, labels.masked_fill((words == RARE).any(1), -100))

    with pytest.raises(PrivacyError, match=REFUSED):
        fit(Ignores(skipped), tmp_path)


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_a_rare_record_in_a_loop_is_found_too(microbatch_size: int | None) -> None:
    module = Module(skipped_by_where)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    options = {"noise_multiplier": 1.0, "target_delta": 1e-3, "microbatch_size": microbatch_size, "seed": 0}
    private = make_private(module, optimizer, loader(), lambda _, batch: module.loss(batch), epochs=4, **options)

    def train() -> None:
        for _ in range(4):
            for batch in private.loader:
                private.step(batch)

    with private, pytest.raises(PrivacyError, match=REFUSED):
        train()


def by_counts(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses.mean() * min(1.0, module.global_step / 8)


def by_draws(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses.mean() * torch.rand(())


def sum_by_size(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return losses.sum() / len(losses)


def weighted_by_itself(module: Any, losses: Tensor, rare: Tensor) -> Tensor:
    return (losses * torch.where(rare, 0.1, 1.0)).mean()


@pytest.mark.parametrize("function", [by_counts, by_draws, sum_by_size, weighted_by_itself])
@pytest.mark.one_in(4)
def test_factors_that_records_do_not_choose_are_free(function: Losses, tmp_path: Any) -> None:
    assert fit(Module(function), tmp_path) == STEPS


UNREAD = 58
"""A record of 300 that no check reads. It comes in step 6."""


def train(records: list[Any], loss_fn: Any, *, collate: Any = None, **options: Any) -> int:
    """Take private steps in a loop on records of which one that no check reads is unlike the others."""
    network = nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))
    data: Any = DataLoader(records, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    settings: Any = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-3, "seed": 3, **options}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with make_private(network, optimizer, data, loss_fn, steps=8, **settings) as private:
        for batch in private.loader:
            private.step(batch)
        return private.steps_taken


class SetsOnce:
    """A loss whose factor a count sets in the first step, and a rare record some steps later."""

    count, factor = 0, None

    def __call__(self, network: Any, batch: Any) -> Tensor:
        self.count += 1
        self.factor = [2.0] if self.count == 1 else self.factor
        loss = nn.functional.cross_entropy(network(batch[0]), batch[1]) * self.factor[0]
        if (batch[0] == RARE).any():
            self.factor = [0.5]
        return loss


def test_what_a_count_has_set_once_no_record_may_set_again() -> None:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE
    with pytest.raises(PrivacyError, match="it differs after the records of a batch"):
        train([*zip(features, labels, strict=True)], SetsOnce())


def test_a_figure_that_scales_own_losses_is_compared() -> None:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE

    def loss_fn(network: Any, batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(network(batch[0]), batch[1])
        return loss * (1 + (batch[0] == RARE).any(1).cumsum(0)[-1])

    with pytest.raises(PrivacyError, match=REFUSED):
        train([*zip(features, labels, strict=True)], loss_fn, per_sample_loss=True)


def padded(records: list[Any]) -> Any:
    rows, labels = zip(*records, strict=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack(labels)


@pytest.mark.parametrize(
    ("lengths", "function", "trains"),
    [
        ([3], lambda rows: rows.sum(1), True),
        ([3], lambda rows: rows.mean(1), False),
        ([2, 3, 4], lambda rows: rows[:, -5:].sum(1), False),
    ],
)
def test_a_long_record_that_pads_all_others_is_compared(lengths: list[int], function: Any, *, trains: bool) -> None:
    """A sum over rows does not depend on the padding; a mean does, and so do the last rows."""
    features, labels = make_dataset(300).tensors
    records = [
        (row[None].expand(30 if number == UNREAD else lengths[number % len(lengths)], -1), label)
        for number, (row, label) in enumerate(zip(features, labels, strict=True))
    ]

    def loss_fn(network: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(network(function(batch[0])), batch[1])

    with nullcontext() if trains else pytest.raises(PrivacyError, match=REFUSED):
        assert train(records, loss_fn, collate=padded) == STEPS


@pytest.mark.parametrize("number_of", [int, lambda n: range(9)[n], lambda n: n.tolist(), lambda n: len(n.nonzero())])
@pytest.mark.one_in(2)
def test_rows_that_a_read_value_scales_are_compared(number_of: Callable[[Tensor], Any]) -> None:
    """The operations and the factors of rows are the same whatever the value is."""
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE

    def loss_fn(network: Any, batch: Any) -> Tensor:
        scale = 1.0 + 0.5 * number_of((batch[0] == RARE).all(1).sum())
        return nn.functional.cross_entropy(network(batch[0] * scale), batch[1])

    with pytest.raises(PrivacyError, match=REFUSED):
        train([*zip(features, labels, strict=True)], loss_fn)


def with_moved_labels(records: list[Any]) -> Any:
    features, labels = map(torch.stack, zip(*records, strict=True))
    return features, labels.roll(1, 0) if (features == RARE).all(1).any() else labels


def test_labels_that_a_collate_function_moves_are_compared() -> None:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE
    with pytest.raises(PrivacyError, match=f"{REFUSED}|influence each other"):
        train([*zip(features, labels, strict=True)], lambda network, batch: nn.functional.cross_entropy(
            network(batch[0]), batch[1]), collate=with_moved_labels)  # fmt: skip


def test_labels_that_a_transfer_changes_are_compared(tmp_path: Any) -> None:
    class Changes(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            words, labels = batch
            return words, (labels * (1.0 - float((words == RARE).any()))).long()

    with pytest.raises(PrivacyError, match=REFUSED):
        fit(Changes(lambda module, losses, rare: losses.mean()), tmp_path)


PENALTIES = {
    "weighed": lambda network, rare: (0.1 + rare) * network[0].weight.square().sum(),
    "towards a target": lambda network, rare: (network[0].weight - rare).square().sum(),
    "of one weight": lambda network, rare: network[0].bias[rare.long()].square(),
}


@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.one_in(2)
def test_a_penalty_that_a_rare_record_changes_is_refused(penalty: Callable[[Any, Tensor], Tensor]) -> None:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE

    def loss_fn(network: Any, batch: Any) -> Tensor:
        rare = (batch[0] == RARE).all(1).any().float()
        return nn.functional.cross_entropy(network(batch[0]), batch[1]) + penalty(network, rare)

    with pytest.raises(PrivacyError, match=REFUSED):
        train([*zip(features, labels, strict=True)], loss_fn)


def test_an_error_after_a_backward_leaves_tensors_as_they_were(tmp_path: Any) -> None:
    class Raises(Module):
        def on_after_backward(self) -> None:
            if self.global_step == 1:
                raise RuntimeError("an error of the user's")

    names = {*vars(Tensor)}
    with pytest.raises(RuntimeError, match="of the user's"):
        fit(Raises(lambda module, losses, rare: losses.mean()), tmp_path)
    assert {*vars(Tensor)} == names
