"""Runs on trial: what coins they try, and what they show while they are under way."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy
from lightning_dp.errors import ComparisonError
from lightning_dp.reporting.card import privacy_card
from lightning_dp.reporting.card_markdown import to_markdown
from lightning_dp.trials import runs
from lightning_dp.trials.draws import HIGH, LOW, MIDDLE, Draws
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.trial import Trial
from lightning_dp.trials.written import Written
from tests.helpers import Classifier, make_loader, make_trainer


class Plain(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(nn.functional.dropout(self(batch[0])), batch[1])


class OfTorch(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx)


class OfPython(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] * (1.0 + random.random()), batch[1]), batch_idx)


def fit(module: Any, tmp_path: Path, **options: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=1, **options).fit(module, make_loader())


@pytest.mark.parametrize(
    ("kind", "expected"), [(Plain, {MIDDLE}), (OfTorch, {LOW, MIDDLE, HIGH}), (OfPython, {LOW, MIDDLE, HIGH})]
)
@pytest.mark.one_in(3)
def test_coins_are_tried_where_some_are_drawn(
    kind: type[Classifier], expected: set[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: set[float] = set()
    run = TrialRuns.run

    def noting(self: TrialRuns, records: Any, draws: Draws, **options: Any) -> Any:
        tried.add(draws.coin)
        return run(self, records, draws, **options)

    monkeypatch.setattr(TrialRuns, "run", noting)
    fit(kind(), tmp_path)
    assert tried == expected


class DrawsLater(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        drawn = torch.randn_like(batch[0]) if self.global_step else 0.0
        return super().training_step((batch[0] + drawn, batch[1]), batch_idx)


class Counting(Classifier):
    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(DrawsLater, {"real", "frozen"}), (Plain, {"frozen"}), (Classifier, {"real"})],
    ids=["later", "dropout", "none"],
)
def test_states_are_compared_with_frozen_draws_if_there_are_any(
    kind: type[Classifier], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run with real draws is compared if it has moved torch's generator."""
    found: set[Any] = set()
    rehearse = TrialRuns.rehearse

    def noting(self: TrialRuns, records: Any, **options: Any) -> Any:
        probe = rehearse(self, records, **options)
        seeded = torch.Generator().manual_seed(torch.initial_seed())
        moved = not torch.equal(torch.get_rng_state(), seeded.get_state())
        found.add(("frozen" if options["freezes"] else "real", moved))
        return probe

    monkeypatch.setattr(TrialRuns, "rehearse", noting)
    fit(kind(), tmp_path)
    assert {how for how, _ in found} == expected
    assert ("real", True) not in found


@pytest.mark.parametrize("kind", [Classifier, Counting])
def test_writes_that_the_first_check_has_seen_need_no_other(
    kind: type[Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Written, "check", lambda *args, **options: pytest.fail("checked again"))
    fit(kind(), tmp_path)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.one_in(2)
def test_progress_of_long_checks_is_shown(
    shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "SILENT_FOR", 0.0)
    threads = set(threading.enumerate())
    fit(Plain(), tmp_path, enable_progress_bar=shown)
    assert ("Checking on a few records that samples are independent" in capsys.readouterr().err) == shown
    assert not [t for t in set(threading.enumerate()) - threads if "tqdm" in type(t).__module__ and not shown]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.one_in(2)
def test_layers_that_a_coin_leaves_out_are_learned(memory: Any, tmp_path: Path) -> None:
    """Each of two layers takes part with probability one half, by Python's generator: no batch is refused."""

    class Dropping(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.ModuleList(nn.Linear(6, 6) for _ in range(2)))
            self.head = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0]
            for layer in self.network:
                if random.random() < 0.5:
                    x = x + layer(x)
            return nn.functional.cross_entropy(self.head(x), batch[1])

    module, options = Dropping(), {"noise_multiplier": 1.0, "target_delta": 1e-3, "memory": memory}
    trainer = make_trainer(DPStrategy(**options), tmp_path, max_epochs=4)
    trainer.fit(module, make_loader())
    assert trainer.global_step == 16


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "checked on a few records before steps 1, 2, 10"),
        ({"microbatch_size": 1}, "by construction, one sample runs at a time"),
        ({"check_per_sample": False}, "taken as said (check_per_sample=False)"),
    ],
)
@pytest.mark.one_in(2)
def test_statement_says_why_samples_are_independent(options: Any, expected: str, tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, **options)
    make_trainer(strategy, tmp_path, max_epochs=3).fit(Plain(), make_loader())
    assert f"samples kept apart: {expected}" in strategy.privacy_statement()
    card = privacy_card(strategy.plan, strategy.ledger, strategy.accountant, notes=strategy.state.notes)
    assert f"| samples kept apart | {expected} |" in to_markdown(card)


class Negatives(Classifier):
    """Each record is scaled by as many draws as its own values ask for."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scales = [sum(self.draw() for _ in range(1 + int(row[0] > 0))) for row in batch[0]]
        return super().training_step((batch[0] * torch.tensor(scales)[:, None], batch[1]), batch_idx)


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: float(np.random.rand())],  # noqa: NPY002
)
def test_draws_that_other_records_shift_are_named_first(draw: Callable[[], float], tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"Likely causes: draws by Python's random or numpy"):
        fit(Negatives(draw), tmp_path)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, grad_sample="single")
    make_trainer(strategy, tmp_path, max_epochs=1).fit(Negatives(draw), make_loader())


def test_couplings_without_such_draws_name_none(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"^(?!.*draws by Python)"):
        fit(Classifier(nn.Sequential(nn.Linear(6, 3), nn.Softmax(0))), tmp_path)


@pytest.mark.parametrize(
    ("text", "end"), [("They differ. ", r"alone\)\."), ("Likely causes: others.", "alone\\); others.")]
)
def test_a_difference_keeps_its_size_and_other_causes(text: str, end: str) -> None:
    found, error = object.__new__(TrialRuns), ComparisonError(text)
    found.draws_on_host, error.difference = True, 0.5
    with pytest.raises(ComparisonError, match=f"Likely causes: draws by .*{end}$") as raised, found.naming_draws():
        raise error
    assert raised.value.difference == 0.5


def test_checks_are_repeated_at_public_steps() -> None:
    """Three times in 1,000 steps, then at the first step of an epoch after 1,000 more, or after 10,000."""
    trial = object.__new__(Trial)
    due = []
    trial._checked_at = 0
    for number in range(30_000):
        if trial.is_due(number, first_of_pass=number % 700 == 0 and number < 5_000):
            due.append(number + 1)
            trial._checked_at = number
    assert due == [2, 10, 100, 1_401, 2_801, 4_201, 14_201, 24_201]
