"""Couplings: differences as small as rounding are judged by repetition."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_dp import DPStrategy
from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.trials.couplings import Couplings
from lightning_dp.trials.draws import Draws
from tests.helpers import Classifier, make_dataset, make_loader, make_trainer


class Weighted(Classifier):
    """Weights every loss by the share of a label in the batch, which no spoiled record changes."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features, labels = batch
        share = (labels == labels.max()).float().mean() + labels.float().mean()
        return nn.functional.cross_entropy(self(features), labels) * (1.0 + self.strength * share)


class Unsteady(Classifier):
    """Rounds in another way in one of five runs, as with threads that share out their work in another way."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1.0 + 6e-6 * (next(RUNS) % 5 == 2))


class AtAKink(Classifier):
    """Has a value so near to a kink that rounding in a batch of four pushes it over, until the weights are others."""

    def __init__(self, factor: float, *, always: bool = False) -> None:
        super().__init__()
        self.factor, self.always = factor, always
        self.at_the_kink = float(self.network[0].weight.detach().sum())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        flips = len(batch[0]) == 4 and (self.always or float(self.network[0].weight.detach().sum()) == self.at_the_kink)
        return super().training_step(batch, batch_idx) * (self.factor if flips else 1.0)


class Hidden(Classifier):
    """Adds a mean over the batch of a high power, far below rounding while the weights are small."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.network[0].parameters():
                parameter *= 0.05

    def forward(self, x: Tensor) -> Tensor:
        x = x.nan_to_num().clamp(-2, 2)
        return super().forward(x) * (1.0 + self.network[0](x).pow(8).mean(0).sum())


class Limited(Classifier):
    """Cannot run with weights far from those of its start."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.network[0].weight.detach().abs().max() < 0.7
        return super().forward(x)


class Later(Classifier):
    """Mixes samples if one of them is huge, once the weights are large, which they are from the fourth step on."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        if self.network[0].weight.detach().abs().max() < 0.7:
            return scores
        return scores + (x.detach() > 1e3).any() * scores.mean(0)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-9 if step < 3 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


RUNS = itertools.count()


def fit(module: Any, tmp_path: Path) -> DPStrategy:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=1).fit(module, make_loader())
    return strategy


@pytest.mark.parametrize("strength", [1e-4, 5e-5])
def test_weak_couplings_are_refused_in_float32(strength: float, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="One sample of a batch was exchanged for another record"):
        fit(Weighted(strength), tmp_path)


def test_couplings_that_small_weights_hide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="under other weights"):
        fit(Hidden(), tmp_path)


def test_modules_may_refuse_other_weights(tmp_path: Path) -> None:
    assert fit(Limited(), tmp_path).ledger.num_steps == 4


def test_branches_of_other_weights_count_as_new_in_training(tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match="one record could move the sum"):
        make_trainer(strategy, tmp_path, max_epochs=2).fit(Later(), make_loader())
    assert strategy.ledger.num_steps < 8


def test_rounding_that_changes_between_runs_is_allowed(tmp_path: Path) -> None:
    assert fit(Unsteady(), tmp_path).ledger.num_steps == 4


def test_a_value_at_a_kink_is_allowed(tmp_path: Path) -> None:
    assert fit(AtAKink(1.01), tmp_path).ledger.num_steps == 4


@pytest.mark.parametrize(("factor", "always"), [(1.01, True), (1.2, False)])
def test_differences_that_no_kink_makes_are_refused(factor: float, always: bool, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="One sample of a batch was left out"):
        fit(AtAKink(factor, always=always), tmp_path)


def test_closures_run_with_gradients_under_any_optimizer(tmp_path: Path) -> None:
    class WithoutGradients(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            super().step()
            return loss

    class Asking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.is_grad_enabled()
            return super().training_step(batch, batch_idx)

    module = Asking(optimizer=WithoutGradients)
    assert fit(module, tmp_path).ledger.num_steps == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_of_nothing_are_refused(tmp_path: Path) -> None:
    calls = itertools.count()

    def collate(records: list[Any]) -> Any:
        return None if next(calls) % 2 == 0 else default_collate(records)

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer = make_trainer(strategy, tmp_path, max_epochs=1)
    with pytest.raises(PrivacyError, match="records as drawn, got None"):
        trainer.fit(Classifier(), DataLoader(make_dataset(), batch_size=16, collate_fn=collate))


@pytest.mark.parametrize(
    ("differences", "runs"),
    [([], [0]), ([0.0012], [0, 1]), ([0.0012] * 4, [0, 1, 2, 3]), ([0.06], [0])],
    ids=["none", "once", "always", "large"],
)
def test_a_small_difference_from_single_runs_is_looked_at_again(differences: list[float], runs: list[int]) -> None:
    left, moved = [*differences], []

    class Alone(Couplings):
        def _compare_alone(self, snapshot: Any, records: list[Any], draws: Draws) -> None:
            moved.append(draws.moved)
            if left:
                error = ComparisonError("another gradient")
                error.difference = left.pop()
                raise error

    runs_of_step: Any = SimpleNamespace(step=SimpleNamespace(reduction=SimpleNamespace(world_size=1)))
    couplings = Alone.__new__(Alone)
    couplings._runs = runs_of_step
    with pytest.raises(ComparisonError) if len(differences) == len(runs) else nullcontext():
        couplings.check_alone(None, [1, 2])  # type: ignore[arg-type]
    assert moved == runs
