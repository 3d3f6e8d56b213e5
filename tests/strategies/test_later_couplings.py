"""A coupling of samples that begins after some steps, between two of the regular checks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError, make_private

BEGINS = 15
PLANNED = 20


class Network(nn.Module):
    """Subtracts the mean of the batch from features that are far from the loss, if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.middle = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(20))

    def forward(self, rows: Tensor, *, mixes: bool) -> Tensor:
        features = self.first(rows)
        features = features - features.mean(0) if mixes else features
        for layer in self.middle:
            features = features + layer(features)
        out: Tensor = self.last(features)
        return out


class Module(L.LightningModule):
    def __init__(self, *, automatic: bool, begins: int) -> None:
        super().__init__()
        self.network, self.automatic_optimization, self.begins = Network(), automatic, begins

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.network(batch[0], mixes=self.global_step >= self.begins).square().mean()
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(100, 4)), batch_size=10)


def steps_of_fit(*, automatic: bool, begins: int) -> tuple[int, str]:
    """Number of released steps, and what stopped the run."""
    strategy = DPStrategy(noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-3)
    trainer = L.Trainer(
        max_steps=PLANNED,
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(Module(automatic=automatic, begins=begins), loader())
    except PrivacyError as error:
        return strategy.steps_taken, str(error)
    return strategy.steps_taken, ""


def test_coupling_is_refused_before_its_first_step() -> None:
    steps, error = steps_of_fit(automatic=True, begins=BEGINS)
    assert steps == BEGINS
    assert "exchanged for another record" in error


def test_coupling_under_manual_steps_is_refused_after_one() -> None:
    steps, error = steps_of_fit(automatic=False, begins=BEGINS)
    assert steps == BEGINS + 1
    assert "exchanged for another record" in error
    assert "in the step before this one, which was released" in error


def test_coupling_in_the_last_manual_step_is_refused() -> None:
    steps, error = steps_of_fit(automatic=False, begins=PLANNED - 1)
    assert steps == PLANNED
    assert "which was released" in error


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_coupling_in_a_loop_is_refused_before_its_step(microbatch_size: int | None) -> None:
    network = Network()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(batch[0], mixes=private.steps_taken >= BEGINS).square().mean()

    private = make_private(
        network,
        torch.optim.SGD(network.parameters(), lr=0.01),
        loader(),
        loss_fn,
        steps=PLANNED,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        target_delta=1e-3,
        microbatch_size=microbatch_size,
    )

    def train() -> None:
        while private.steps_taken < PLANNED:
            for batch in private.loader:
                private.step(batch)

    with private, pytest.raises(PrivacyError, match="exchanged for another record"):
        train()
    assert private.steps_taken == BEGINS


@pytest.mark.parametrize("automatic", [True, False])
def test_modules_without_a_coupling_train(automatic: bool) -> None:
    assert steps_of_fit(automatic=automatic, begins=PLANNED) == (PLANNED, "")
