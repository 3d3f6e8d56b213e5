"""The contract through Trainers: every two callbacks together; one record moves a release by its sensitivity at most.

``tests/step/test_contract.py`` runs all combinations, clippings included, in memory.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from lightning_dp.clipping import top_agg
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.plan import SENSITIVITY_FACTOR
from lightning_dp.step.step import PrivateStep
from tests.helpers import Classifier, Recorder
from tests.step.composition.table import (
    BOUNDS,
    CLIPPINGS,
    MASKS,
    NOISES,
    NUM_RECORDS,
    PHASES,
    Combination,
    NoiseSpy,
    fit,
    make_data,
    pairwise,
)

COMBINATIONS = [Combination(*names) for names in itertools.product(CLIPPINGS, MASKS, NOISES, BOUNDS, PHASES)]
#: Every two callbacks that may meet, and every clipping.
LEGAL = pairwise([combination for combination in COMBINATIONS if not combination.refusal], but=("clipping",))
#: Each reason, with each clipping and bound.
REFUSED = [c for c in COMBINATIONS if c.refusal and (c.mask, c.noise, c.phase) == ("sparse_pruned", "step", "private")]
#: Rounding of float32 sums of a few terms.
ROUNDING = 1e-5


def test_every_two_callbacks_meet() -> None:
    tables = {"mask": MASKS, "noise": NOISES, "bound": BOUNDS, "phase": PHASES}
    for (one, names), (other, others) in itertools.combinations(tables.items(), 2):
        met = {(getattr(c, one), getattr(c, other)) for c in LEGAL}
        assert met == set(itertools.product(names, others))
    assert {combination.clipping for combination in LEGAL} == set(CLIPPINGS)
    assert {combination.clipping for combination in REFUSED} == {"none", "top_agg", "top_agg_plain", "top_agg_values"}


@pytest.mark.parametrize("combination", REFUSED, ids=str)
def test_refused_before_any_release(combination: Combination, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = NoiseSpy(monkeypatch)
    with pytest.raises(ValueError, match=combination.refusal):
        fit(combination, tmp_path)
    assert spy.draws == []


@pytest.mark.parametrize("combination", LEGAL, ids=str)
@pytest.mark.one_in(3)
def test_contract(combination: Combination, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that differ in one record; all records are in every batch, and the weights stay where they are.

    With a learning rate of 0 only a bound that learns makes later steps differ, so those compare the first step.
    """
    runs = []
    for outlier in (0.0, 30.0):
        spy, recorder = NoiseSpy(monkeypatch), Recorder()
        monkeypatch.setattr(top_agg, "coin_generator", lambda device: torch.Generator(device).manual_seed(0))
        strategy, _, _ = fit(
            combination,
            tmp_path,
            data=make_data(outlier=outlier),
            batch_size=NUM_RECORDS,
            callbacks=[recorder],
            module=still(),
            trainer_options={"max_epochs": 3},
        )
        monkeypatch.undo()
        runs.append((strategy, spy, recorder))
    (strategy, spy, recorder), (_, other_spy, _) = runs
    plan = strategy.plan

    events = [run.event for run in strategy.ledger.entries for _ in range(run.num_steps)]
    assert events == [plan.event(step) for step in range(3)]
    assert math.isfinite(strategy.epsilon()) == combination.is_private
    assert len(spy.gradients) == 3
    assert len(spy.statistics) == (3 if combination.bound in ("adaptive", "published") else 0)

    compared = 1 if combination.bound in ("auto", "adaptive") else 3
    for step in range(compared):
        drawn, other = spy.gradients[step], other_spy.gradients[step]
        assert drawn.before.shape == other.before.shape
        assert drawn.std == other.std
        if not combination.is_private:
            continue
        moved = float(torch.linalg.vector_norm((drawn.before - other.before).double()))
        # exchanging a record is removing one and adding another: twice the sensitivity
        squared = (moved / 2 / drawn.std) ** 2
        if spy.statistics:
            counted, other_count = spy.statistics[step], other_spy.statistics[step]
            assert counted.std == other_count.std
            squared += (float((counted.before - other_count.before).abs()) / 2 / counted.std) ** 2
        assert moved > 0
        assert squared <= plan.sigma(step) ** -2 * (1 + ROUNDING)

    for step, gradients in enumerate(recorder.before_step):
        total = torch.cat([gradient.flatten() for gradient in gradients.values()])
        live = int(spy.gradients[step].before.numel())
        assert int((total != 0).sum()) <= live
        if plan.sigma(step) > 0 and combination.clipping != "top_agg_plain":
            assert int((total != 0).sum()) == live  # nothing live without noise, nothing masked with any


def still() -> Classifier:
    """A classifier whose weights do not move."""
    return Classifier(lr=0.0)


@pytest.mark.parametrize("combination", [c for c in LEGAL if c.phase == "private"][::3], ids=str)
@pytest.mark.one_in(3)
def test_replacing_a_record_doubles_every_noise(
    combination: Combination, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient's noise and the count's, in the first step: a bound that learns goes its own way afterwards."""
    stds = []
    for relation in ("add_or_remove_one", "replace_one"):
        spy = NoiseSpy(monkeypatch)
        options = {"max_epochs": 1, "max_steps": 1}
        fit(combination, tmp_path, accountant="pld", neighboring_relation=relation, trainer_options=options)
        monkeypatch.undo()
        stds.append([draw.std for draw in spy.draws])
    assert len(stds[0]) == 1 + (combination.bound in ("adaptive", "published"))
    assert stds[1] == pytest.approx([std * SENSITIVITY_FACTOR["replace_one"] for std in stds[0]])


@pytest.mark.parametrize("combination", LEGAL[::6], ids=str)
@pytest.mark.one_in(2)
def test_noise_drawn_first_is_the_noise_added_last(
    combination: Combination, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one seed a sum that begins with its noise is the sum to which it is added: the same gradients up to
    rounding.
    """
    gradients, ledgers, drawn, fill_ = [], [], [], GaussianNoise.fill_
    for first in (True, False):
        filled: list[float] = []
        monkeypatch.setattr(GaussianNoise, "fill_", lambda *args, to=filled: (to.append(args[2]), fill_(*args))[1])
        if not first:
            monkeypatch.setattr(PrivateStep, "noise_comes_first", lambda self: False)
        monkeypatch.setattr(top_agg, "coin_generator", lambda device: torch.Generator(device).manual_seed(0))
        recorder = Recorder()
        options = {"microbatch_size": 5, "trainer_options": {"max_epochs": 3}}
        strategy, _, _ = fit(combination, tmp_path, callbacks=[recorder], **options)
        monkeypatch.undo()
        gradients.append([torch.cat([g.flatten() for g in found.values()]) for found in recorder.before_step])
        ledgers.append(strategy.ledger.entries)
        drawn.append(filled)
    assert ledgers[0] == ledgers[1]
    num_noisy = sum(strategy.plan.sigma(step) > 0 for step in range(len(gradients[0])))
    assert [len(stds) for stds in drawn] == [num_noisy, 0]
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())
