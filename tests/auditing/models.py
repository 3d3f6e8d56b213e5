"""Small modules of which an audit can see everything: parameters that no record touches, so that canaries have them
alone.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyAudit
from tests.helpers import NUM_FEATURES, Classifier, make_loader, make_trainer

DELTA = 1e-5
ALMOST_SURE = 1 - 1e-5


class Idle(Classifier):
    """A classifier with ``num_idle`` more parameters whose gradient is zero for every record."""

    def __init__(self, num_idle: int = 1000, lr: float = 0.01) -> None:
        super().__init__(lr=lr)
        self.idle = nn.Linear(num_idle, 1, bias=False)


def audited(
    tmp_path: Any,
    *,
    num_canaries: int = 1000,
    noise_multiplier: float = 2.0,
    batch_size: int = 64,
    epochs: int = 16,
    module: L.LightningModule | None = None,
    strategy: DPStrategy | None = None,
    callbacks: Any = (),
    **options: Any,
) -> tuple[PrivacyAudit, DPStrategy]:
    """One audited run on 64 records: q = 1 by default, 16 steps at sigma 2, so mu = 2 and epsilon 10.0."""
    audit = PrivacyAudit(num_canaries, confidence=ALMOST_SURE)
    strategy = strategy or DPStrategy(noise_multiplier=noise_multiplier, target_delta=DELTA, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, max_epochs=epochs, callbacks=[audit, *callbacks], **options)
    trainer.fit(module or Idle(num_canaries), make_loader(batch_size=batch_size))
    return audit, strategy


class Overfitting(L.LightningModule):
    """A linear model with more features than records: it can learn every canary by heart."""

    def __init__(self, num_features: int, lr: float) -> None:
        super().__init__()
        self.layer, self.lr = nn.Linear(num_features, 1, bias=False), lr
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, targets = batch
        loss = (self.layer(features).squeeze(1) - targets).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def zeros_loader(num_records: int, num_features: int) -> DataLoader[Any]:
    """Records that ask for nothing."""
    return DataLoader(
        TensorDataset(torch.zeros(num_records, num_features), torch.zeros(num_records)), batch_size=num_records
    )


__all__ = ["ALMOST_SURE", "DELTA", "NUM_FEATURES", "Idle", "Overfitting", "audited", "zeros_loader"]
