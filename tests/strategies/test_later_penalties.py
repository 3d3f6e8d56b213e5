"""A penalty on weights that begins, after some steps, to read the data or to mix samples."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import make_trainer

PLANNED = 14
BEGINS = 4


class Penalised(L.LightningModule):
    """Weights of a learned scale, a loop with equal functions of one parameter, and entries used one by one."""

    def __init__(self, change: str, begins: int) -> None:
        super().__init__()
        self.change, self.begins = change, begins
        self.first = nn.Linear(4, 6)
        self.mean, self.scale = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.zeros(3, 6))
        self.decay, self.gains = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.randn(3, 2))

    def forward(self, rows: Tensor, *, mixes: bool) -> Tensor:
        state = self.first(rows)
        for _ in range(3):
            state = state + (F.softplus(self.decay) * state).tanh()
        state = state - state.mean(0) if mixes else state
        out = F.linear(state, self.mean + F.softplus(self.scale))
        columns = [self.gains[j, 0] * out[:, [j]].sin() + self.gains[j, 1] for j in range(3)]
        return torch.cat(columns, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        change = self.change if self.global_step >= self.begins else "none"
        out = self(batch[0], mixes=change == "features mix")
        loss = F.cross_entropy(out, batch[1])
        penalty = self.mean.square().sum() + F.softplus(self.scale).sum()
        if change == "reads data":
            penalty = penalty * batch[0].mean()
        elif change == "reads the loss":
            penalty = penalty * loss.detach()
        elif change == "mixes outputs":
            loss = loss + out.softmax(0).square().sum()
        elif change == "of the largest loss":
            loss = F.cross_entropy(out, batch[1], reduction="none").max()
        elif change == "a figure":
            self.log("moved", (self.mean - torch.ones(6)).norm() * batch[0].mean())
        return loss + 0.01 * penalty

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(change: str, begins: int) -> DPStrategy:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(100, 4), torch.randint(0, 3, (100,)))
    strategy = DPStrategy(noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-3, seed=0)
    try:
        trainer = make_trainer(strategy, None, max_epochs=-1, max_steps=PLANNED)
        trainer.fit(Penalised(change, begins), DataLoader(data, batch_size=10))
    except PrivacyError as error:
        error.add_note(f"after {strategy.steps_taken} steps")
        raise
    return strategy


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("reads data", "in a way that was learned"),
        ("reads the loss", "in a way that was learned"),
        ("mixes outputs", "exchanged for another record"),
        ("features mix", "exchanged for another record"),
        ("of the largest loss", "samples influence each other"),
    ],
)
@pytest.mark.one_in(2)
def test_penalty_that_changes_is_refused_before_its_step(change: str, match: str) -> None:
    with pytest.raises(PrivacyError, match=match) as caught:
        fit(change, BEGINS)
    assert caught.value.__notes__ == [f"after {BEGINS} steps"]


def test_figure_of_weights_that_no_loss_reads_is_free() -> None:
    assert fit("a figure", BEGINS).steps_taken == PLANNED


@pytest.mark.slow
def test_penalty_that_stays_trains() -> None:
    assert fit("reads data", PLANNED).steps_taken == PLANNED
