"""Private training on rows of unequal number, end to end: what a Trainer hands the engine."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy
from tests.per_sample.test_owners import GCN, Graphs, Loop, _collate_graphs, _graph


class Training(L.LightningModule):
    """A module whose loss is the mean of one loss per sample."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.inner(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(module: nn.Module, data: Any, collate: Any = None, **options: Any) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, seed=0, **options)
    trainer = L.Trainer(
        max_epochs=1,
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(module), DataLoader(data, batch_size=4, collate_fn=collate))
    return strategy


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["mapping", "object"])
def test_graphs_train_privately_by_rules(kind: str) -> None:
    torch.manual_seed(0)
    module = GCN("gcn")
    module.of_edges.requires_grad_(False)
    module.att.requires_grad_(False)

    def collate(records: list[Any]) -> Any:
        batch = _collate_graphs(records)
        return Graphs(**batch) if kind == "object" else batch

    before = module.first.weight.detach().clone()
    strategy = fit(module, [_graph(i % 4) for i in range(12)], collate)
    assert strategy._fit is None
    assert strategy.ledger.num_steps == 3
    assert not torch.equal(before, module.first.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["slices", "sum of losses"])
def test_loops_over_samples_train_privately(how: str) -> None:
    torch.manual_seed(0)
    module = Loop(how)
    options = {"loss_reduction": "sum"} if how == "sum of losses" else {}
    strategy = fit(module, torch.randn(12, 3, dtype=torch.float64), **options)
    assert strategy.ledger.num_steps == 3
