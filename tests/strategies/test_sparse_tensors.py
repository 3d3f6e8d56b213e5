"""Sparse matrices of a module and in its batches: they train, and what rare records write to them is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, make_dataset, make_trainer
from tests.strategies.test_latched_state import REFUSED, Module, steps_of_fit

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (invariant|CSR)")


def in_a_buffer(module: Any) -> None:
    module.links._values().mul_(0.5)


def in_an_attribute(module: Any) -> None:
    module.others.values().mul_(0.5)


def another_attribute(module: Any) -> None:
    module.others = module.others * 0.5


class Linked(Module):
    """Scores that pass through two sparse matrices, a buffer and an attribute."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        super().__init__(act)
        self.register_buffer("links", torch.eye(3).to_sparse())
        self.others = torch.eye(3).to_sparse_csr()
        self.function = lambda rows: rows.tanh() * (self.links @ self.others.to_dense()).sum()


@pytest.mark.parametrize("act", [in_a_buffer, in_an_attribute, another_attribute])
def test_what_a_rare_record_writes_to_a_sparse_one_is_refused(act: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        steps_of_fit(tmp_path, Linked(act))


class Network(nn.Module):
    """A table that is smoothed along the edges of a graph, and rows of it that a sparse record names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3)
        self.register_buffer("links", torch.eye(6).roll(1, 0).to_sparse_csr())

    def forward(self, records: Tensor) -> Tensor:
        table = self.links @ self.table + torch.sparse.mm(self.links, self.table, "mean")
        return self.last(torch.sparse.mm(records, table))


def collated(records: list[Any]) -> Any:
    return torch.stack([one.to_sparse() for one, _ in records]), torch.stack([label for _, label in records])


def test_sparse_records_and_buffers_train_by_rules(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, grad_sample="rules")
    trainer = make_trainer(strategy, tmp_path, max_steps=2)
    trainer.fit(Classifier(Network()), DataLoader(make_dataset(), batch_size=16, collate_fn=collated))
    assert strategy.ledger.num_steps == 2
