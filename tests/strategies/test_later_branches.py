"""Parameters that are first used after the first step: their layout is inferred, and checked, when they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.trials.trial import NUM_TRIED, Trial
from tests.helpers import Classifier, make_loader, make_trainer


class Critic(Classifier):
    """Trains a second network on every third batch; while one of the two trains, the other is frozen."""

    couples = False

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.automatic_optimization = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 6)), False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.network, self.maker)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        critic, maker = self.optimizers()
        noise = batch[0][:, :2]
        with self.only(critic):
            self.descend(critic, self(self.maker(noise).detach()).square().mean() - self(batch[0]).mean())
        if batch_idx % 3 == 2:
            with self.only(maker):
                made = self.maker(noise)
                self.descend(maker, self(made - made.mean(0) if self.couples else made).square().mean())

    @contextmanager
    def only(self, optimizer: Any) -> Iterator[None]:
        self.toggle_optimizer(optimizer)
        yield
        self.untoggle_optimizer(optimizer)

    def descend(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Soft(Classifier):
    """Leaves a learned exponent alone while it is zero, as it is before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.0))

    def forward(self, features: Tensor) -> Tensor:
        if self.alpha == 0.0:
            return self.network(features)
        return self.network(features * self.alpha + self.alpha)


class Late(Classifier):
    """Uses a further layer from the second pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.further = nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features) + (self.further(features) if self.current_epoch else 0.0)


class Turns(Classifier):
    """Takes another layer in each of the first batches, without manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.heads[min(batch_idx, 3)](batch[0]), batch[1])


class Thawing(Classifier):
    """Freezes its first layer on even batches, within the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for parameter in self.network[0].parameters():
            parameter.requires_grad = batch_idx % 2 == 1
        return super().training_step(batch, batch_idx)


def fit(module: Any, tmp_path: Any, batch_size: int = 16, **options: Any) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, grad_sample="rules")
    make_trainer(strategy, tmp_path, max_epochs=2, **options).fit(module, make_loader(batch_size=batch_size))
    return strategy


@pytest.mark.parametrize(
    ("kind", "batch_size", "step"),
    [(Critic, 8, 3), (Turns, 8, 4), (Soft, 8, 2), (Thawing, 8, 2), (Late, 2, 33)],
    ids=["counter", "batch", "weight", "thawed", "epoch"],
)
@pytest.mark.one_in(2)
def test_branch_of_a_later_step_is_learned(
    kind: Any, batch_size: int, step: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And checked before that step, which the data may have asked for: the statement does not name it."""
    assert step <= NUM_TRIED or step == 64 / batch_size + 1  # the first step of a pass
    checked, check = [], Trial.check_again

    def noting(self: Trial, number: int, positions: Any = None) -> None:
        checked.append((number + 1, positions))
        check(self, number, positions)

    monkeypatch.setattr(Trial, "check_again", noting)
    strategy = fit(kind(), tmp_path, batch_size)
    assert (step, None if step == 2 else []) in checked
    assert (step - 1 in strategy.state.checked_steps) == (step == 2)  # where a check is due anyway


def test_coupling_in_a_later_branch_is_refused(tmp_path: Any) -> None:
    """Before the step that takes the branch, so that nothing of it is released."""
    module = Critic()
    module.couples = True
    with pytest.raises(PrivacyError, match="was exchanged for another record") as raised:
        fit(module, tmp_path, 8)
    assert "was released" not in str(raised.value)
