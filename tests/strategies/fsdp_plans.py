"""Cases of fsdp_run.py with a target, a budget, a learned bound, and those that are refused."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from torch import nn
from torch.distributed.tensor import Shard
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    CorrelatedNoise,
    GradientDiagnostics,
    PrivacyAudit,
    PrivacyBudget,
    PrivacyCard,
    TopAgg,
)
from tests.helpers import NUM_FEATURES, make_dataset
from tests.strategies.fsdp_fits import OUT, fit, private, said
from tests.strategies.sharded import Sharded, plain


def planned() -> dict[str, Any]:
    """A target, a budget and a learned bound, each with its callbacks; the card has no plot: it takes long to load."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]
    loader = DataLoader(make_dataset(), batch_size=8)
    target = fit(
        Sharded(plain()),
        loader,
        [PrivacyCard(OUT / "card"), SaveFirst()],
        private(noise_multiplier=None, target_epsilon=3.0),
        max_epochs=2,
    )
    budget = fit(Sharded(plain()), loader, [PrivacyBudget(2.5)], max_epochs=50)
    learned, counted, every = AutoThreshold(), AdaptiveClipping(), DataLoader(make_dataset(), batch_size=32)
    fit(Sharded(plain(), lr=0.0), every, [learned], private(noise_multiplier=0.0), max_steps=2)
    fit(Sharded(plain()), loader, [counted], max_epochs=2)
    return {
        "target": target.strategy.epsilon(),
        "statement": target.strategy.privacy_statement(),
        "card": sorted(path.name for path in (OUT / "card").iterdir()),
        "learned": learned.bound.value,
        "counted": counted.bound.value,
        "budget": (budget.strategy.epsilon(), budget.strategy.ledger.num_steps),
    }


def refused() -> dict[str, str]:
    loader = DataLoader(make_dataset(), batch_size=8)

    class Whole(Sharded):
        def configure_model(self) -> None:
            pass

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(make_dataset())

    return {
        "stream": said(lambda: fit(Sharded(plain()), DataLoader(Stream(), batch_size=8), max_steps=2)),
        "no unit": said(lambda: fit(Whole(plain()), loader)),
        "single": said(lambda: fit(Sharded(plain()), loader, strategy=private(microbatch_size=1))),
        "top_agg": said(lambda: fit(Sharded(plain()), loader, strategy=private(clipping=TopAgg(k=3)))),
        "public": said(lambda: fit(Sharded(plain()), loader, strategy=private(public_optimizers=[0]))),
        "canaries": said(lambda: fit(Sharded(plain()), loader, [PrivacyAudit(num_canaries=4)])),
        "diagnostics": said(lambda: fit(Sharded(plain()), loader, [GradientDiagnostics()])),
        "correlated": said(
            lambda: fit(Sharded(plain()), loader, strategy=private(sampling="cyclic", noise=CorrelatedNoise()))
        ),
        "columns": said(lambda: fit(Sharded(even(), {"shard_placement_fn": by_columns}), loader)),
    }


def even() -> nn.Module:
    """A network whose matrices divide by two along both axes."""
    return nn.Sequential(nn.Linear(NUM_FEATURES, 4), nn.Tanh(), nn.Linear(4, 4))


def by_columns(parameter: nn.Parameter) -> Any:
    """Places a matrix by its columns."""
    return Shard(parameter.dim() - 1)


class SaveFirst(L.Callback):
    """Saves after the first epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(OUT / "target.ckpt")
