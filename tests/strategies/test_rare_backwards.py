"""What a rare record changes for the whole batch in the backward, or in a rule of the user's own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.per_sample import register_rule
from lightning_dp.trials.trial import Trial
from tests.helpers import NUM_FEATURES, make_dataset, make_trainer
from tests.strategies.test_latched_state import RARE
from tests.strategies.test_rare_losses import REFUSED, UNREAD, Module, fit, skipped, train


def records() -> list[Any]:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE
    return [*zip(features, labels, strict=True)]


class Doubles(torch.autograd.Function):
    """Doubles the gradients of all rows if one of them is rare."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rare: Tensor) -> Tensor:
        ctx.rare = rare
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * (2 if ctx.rare.any() else 1), None


def test_a_value_that_a_backward_reads_is_compared() -> None:
    def loss_fn(network: Any, batch: Any) -> Tensor:
        rows: Any = Doubles.apply(network[0](batch[0]), (batch[0] == RARE).all(1))  # type: ignore[no-untyped-call]
        return nn.functional.cross_entropy(network[1:](rows), batch[1])

    with pytest.raises(PrivacyError, match=REFUSED):
        train(records(), loss_fn)


class Hooks(Module):
    """Registers a hook that doubles all gradients if a rare word has come."""

    def loss(self, batch: Any) -> Tensor:
        words, labels = batch
        rows, rare = self.embedding(words).mean(1), (words == RARE).any()
        rows.register_hook(lambda gradient: gradient * (2 if rare else 1))
        return nn.functional.cross_entropy(self.network(rows), labels)


@pytest.mark.parametrize(("automatic", "microbatch_size"), [(True, None), (True, 4), (False, None)])
@pytest.mark.one_in(3)
def test_a_value_that_a_hook_reads_is_compared(automatic: bool, microbatch_size: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED if automatic else f"{REFUSED}.*was released"):
        fit(Hooks(skipped, automatic=automatic), tmp_path, microbatch_size=microbatch_size)


def test_a_value_that_a_registered_rule_reads_is_compared() -> None:
    def doubles(values: Any, backprop: Tensor) -> dict[str, Tensor]:
        factor = 2 if (values["x"] == RARE).all(1).any() else 1
        return {"w": factor * backprop * values["w"] / torch.hypot(values["x"], values["w"])}

    def loss_fn(network: Any, batch: Any) -> Tensor:
        rows = network[0](batch[0]) + torch.hypot(batch[0][:, :5], network[0].bias)
        return nn.functional.cross_entropy(network[1:](rows), batch[1])

    remove = register_rule(torch.hypot, doubles, arguments=("x", "w"), parameters=("w",))
    try:
        with pytest.raises(PrivacyError, match=REFUSED):
            train(records(), loss_fn)
    finally:
        remove()


class TwoSteps(pl.LightningModule):
    """Two losses in a step, whose rows have other weights all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(NUM_FEATURES, 1), nn.Linear(NUM_FEATURES, 1)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for layer, optimizer in zip((self.one, self.two), optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward((layer(batch[0]).squeeze(1) - batch[1]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.one, self.two)]


def test_the_watch_of_weights_counts_as_no_hook(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a step with fewer of them would look new, and be checked."""
    checked, check = [], Trial.check_again

    def noting(self: Trial, number: int, *positions: Any) -> None:
        checked.append(number)
        check(self, number, *positions)

    monkeypatch.setattr(Trial, "check_again", noting)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, seed=0)
    loader = torch.utils.data.DataLoader(make_dataset(300), batch_size=16)
    make_trainer(strategy, tmp_path, max_steps=40, max_epochs=-1).fit(TwoSteps(), loader)
    assert checked == [1, 9]
