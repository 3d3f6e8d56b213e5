"""What callbacks need of a private strategy is there, and nothing of it can be written to by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import lightning as L
import pytest

from lightning_dp import DPDDPStrategy, DPStrategy
from lightning_dp.callbacks._strategy import PrivateStrategy
from lightning_dp.datalens import DataLens, MLPDiscriminator, MLPGenerator
from lightning_dp.step.facts import StateFacts
from tests.helpers import Classifier, make_loader, make_trainer
from tests.strategies.test_manual import GAN
from tests.strategies.test_soundness import private

HOLDER = {*vars(StateFacts), *get_type_hints(StateFacts)}
STRATEGY = HOLDER | {*get_type_hints(PrivateStrategy)}


def public(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def make_datalens() -> DataLens:
    return DataLens(MLPGenerator(4, 2), MLPDiscriminator(2), num_teachers=5, top_k=1, sigma=1.0, z_dim=4)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: DPStrategy(noise_multiplier=1.0), STRATEGY),
        (lambda: DPDDPStrategy(noise_multiplier=1.0), STRATEGY),
        (make_datalens, HOLDER),
    ],
    ids=["single", "ddp", "datalens"],
)
def test_protocol_is_met(make: Any, names: set[str]) -> None:
    holder = make()
    assert {"plan", "mechanisms", "last_allowed_step"} <= public(names)
    assert public(names) <= {*dir(type(holder)), *vars(holder)}


@pytest.mark.slow
def test_accumulators_leave_public_parameters_out(tmp_path: Path) -> None:
    seen: list[tuple[set[str], set[str]]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            strategy: Any = trainer.strategy
            names = {name for sums in strategy.accumulators.values() for name in sums.names}
            seen.append((set(strategy.private_parameters()), names))
            with pytest.raises(TypeError, match="does not support item assignment"):
                strategy.accumulators[0] = None

    trainer = make_trainer(private(public_optimizers=[0]), tmp_path, callbacks=[Look()])
    module = GAN()
    trainer.fit(module, make_loader())
    expected = {f"discriminator.{name}" for name, _ in module.discriminator.named_parameters()}
    assert seen == [(expected, expected)]


def test_losses_are_those_of_evaluation_and_have_no_effect(tmp_path: Path) -> None:
    modes: list[bool] = []
    found: list[float] = []
    records = [make_loader().dataset[i] for i in range(3)]

    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.sizes = 0, [0]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            modes.append(self.training)
            self.calls += 1
            self.sizes.append(len(batch[0]))
            if not self.training:
                self.log("leak", 1.0)
            return super().training_step(batch, batch_idx)

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            strategy: Any = trainer.strategy
            found.extend(strategy.losses(records, lambda module, batch: module.training_step(batch, 0)))
            assert modes == [False] * 3
            assert (pl_module.calls, pl_module.sizes, pl_module.training) == (0, [0], True)
            alone = [Classifier.training_step(pl_module, [part[None] for part in record], 0) for record in records]
            assert found == pytest.approx([float(loss.detach()) for loss in alone], rel=1e-5)

    trainer = make_trainer(private(), tmp_path, callbacks=[Look()])
    trainer.fit(Counting(), make_loader())
    assert len(found) == 3
    assert "leak" not in trainer.callback_metrics
