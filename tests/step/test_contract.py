"""The contract of neighbouring datasets over all combinations of mechanisms, in memory: no Trainer takes part."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dp.clipping import PerLayerClipping, top_agg
from lightning_dp.step.plan import SENSITIVITY_FACTOR
from lightning_dp.step.step import PrivateStep
from tests.cases import each
from tests.step.composition import table
from tests.step.composition.table import BOUNDS, MASKS, NOISES, PHASES, Combination
from tests.step.rig import STEPS, KnownNoise, Rig, Run, make_settings


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One engine for all, and one thread: waking a second one takes longer than any sum here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Rig()
    yield made
    made.step.close()
    torch.set_num_threads(threads)


#: With noise that is shared out between groups, which is drawn in several parts.
CLIPPINGS = {**table.CLIPPINGS, "per_layer_least": lambda: PerLayerClipping(0.5)}
#: Combinations that share clipping, mask and bound; each is run under every schedule of the noise and every phase.
GROUPS = list(itertools.product(CLIPPINGS, MASKS, BOUNDS))
LEGAL = [names for names in GROUPS if not Combination(names[0], names[1], bound=names[2]).refusal]
#: A few of them in which any two names that may meet do; the others are slow.
PAIRS = {
    (one.clipping, one.mask, one.bound) for one in table.pairwise([Combination(c, m, bound=b) for c, m, b in LEGAL])
}
LEGAL_PAIRS = [names if names in PAIRS else pytest.param(names, marks=pytest.mark.slow) for names in LEGAL]
REFUSED = [names for names in GROUPS if Combination(names[0], names[1], bound=names[2]).refusal]
#: Rounding of float32 sums of a few terms.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def _same_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The votes of a sample follow from its own gradient: no coin of ``TopAgg`` tells two batches apart."""
    monkeypatch.setattr(top_agg, "coin_generator", lambda device: torch.Generator(device).manual_seed(0))


def combinations(clipping: str, mask: str, bound: str) -> Iterator[Combination]:
    for noise, phase in itertools.product(NOISES, PHASES):
        yield Combination(clipping, mask, noise, bound, phase)


def records() -> dict[str, tuple[Tensor, Tensor]]:
    """One record of each kind that may join a batch."""
    label = torch.tensor([1])
    ordinary = torch.tensor([[0.5, -1.0, 2.0, 0.1]])
    return {
        "ordinary": (ordinary, label),
        "huge": (ordinary * 1e6, label),
        "NaN": (torch.full_like(ordinary, math.nan), label),
    }


def under(rig: Rig, combination: Combination, **plan: Any) -> Any:
    return rig.under(CLIPPINGS[combination.clipping](), combination.make_callbacks(), **plan)


@pytest.mark.parametrize("names", LEGAL_PAIRS, ids="-".join)
@pytest.mark.one_in(4)
def test_contract_of_neighbouring_datasets(names: Any, rig: Rig) -> None:
    """Two batches that differ in one record, at every step of every schedule and phase; noise comes first, as by
    default.

    All kinds of records join under one schedule of the noise, one kind in turn under each of the others.
    """
    kinds = itertools.cycle(records())
    for combination in combinations(*names):
        thorough = (combination.noise, combination.phase) == ("step", "private")
        chosen = list(records()) if thorough else [next(kinds)]
        with under(rig, combination) as run:
            for number in range(STEPS):
                check_step(rig, run, combination, number, chosen)
            plan, state = run.step.plan, run.step.state
            events = [entry.event for entry in state.ledger.entries for _ in range(entry.num_steps)]
            assert events == [plan.event(number) for number in range(STEPS)], str(combination)
            # an entry that no noise protects has multiplier 0 and an infinite epsilon
            assert all(each.noise_multiplier > 0 for each in state.ledger.mechanisms()) == combination.is_private, str(
                combination
            )


def check_step(rig: Rig, run: Run, combination: Combination, number: int, kinds: list[str]) -> None:
    """One step: what a record moves, what is drawn, and where."""
    release, live, plan, where = run.begin(), run.live(), run.step.plan, f"{combination} at {number}"
    assert release.sigma == plan.sigma(number), where
    others = {}
    if plan.is_private(number) and combination.clipping != "none":
        for kind in kinds:
            features, labels = records()[kind]
            others[kind] = run.sum(torch.cat([rig.features, features]), torch.cat([rig.labels, labels]))
    rig.noise.forget()
    gradient, statistics = run.sum(rig.features, rig.labels)
    stds = stds_of(rig.noise.filled, run.step.accumulators[0].divisor)
    weights = release.drawn_std / stds if stds.numel() else torch.ones(())
    for kind, other in others.items():
        moved, counted = float(((other[0] - gradient) * weights).norm()), float((other[1] - statistics).norm())
        # float32 sums are rounded relative to noise and sum
        allowed = release.sensitivity + ROUNDING * float((gradient * weights).norm())
        assert moved <= allowed, (where, kind)
        assert (moved > 0.01 * release.sensitivity) == (kind != "NaN"), (where, kind)
        if combination.is_private and statistics.numel():
            both = (moved / allowed * release.sensitivity / release.drawn_std) ** 2
            both += (counted / release.statistics_std) ** 2
            assert counted > 0, (where, kind)
            assert both <= release.sigma**-2 * (1 + ROUNDING), (where, kind)
    # the noise: once per active coordinate, with the std that the release states
    assert stds.numel() == (int(live.sum()) if release.noise_std else 0), where
    if release.noise_std:
        assert float(stds.square().mean().sqrt()) == pytest.approx(release.noise_std, rel=1e-12), where
        several = len(set(run.step.accumulators[0].group_sizes) - {0}) > 1
        assert (len(set(stds.tolist())) > 1) == bool(release.shares and several), where
    released = run.release()
    statistics_stds = [std for std in [release.statistics_std] if std > 0]
    assert [std for _, std in rig.noise.added if std > 0] == statistics_stds, where
    assert not bool((released[~live] != 0).any()), where
    if release.noise_std and combination.clipping != "top_agg_plain":  # whose threshold zeroes what it noised
        assert bool((released[live] != 0).all()), where


def stds_of(draws: list[tuple[int, float]], divisor: int = 1) -> Tensor:
    """Std of the noise of every coordinate, in their order."""
    return torch.cat(
        [torch.full((num,), std * divisor, dtype=torch.float64) for num, std in draws] or [torch.zeros(0).double()]
    )


@pytest.mark.parametrize("unit_gradient", ["mean", "sum"])
@pytest.mark.parametrize("names", LEGAL_PAIRS, ids="-".join)
@pytest.mark.one_in(6)
def test_contract_of_neighbouring_users(
    names: Any, unit_gradient: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches that differ in a whole user, who brings three records of one kind: it moves a release as one sample
    does.
    """
    monkeypatch.setattr(rig.step, "settings", make_settings(unit_gradient=unit_gradient, records_per_unit=3))
    combination = Combination(names[0], names[1], "step", names[2])
    owners, bounded = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), combination.clipping != "none"
    with under(rig, combination) as run:
        for number in range(STEPS):
            release, where = run.begin(), f"{combination} at {number}"
            found = [run.sum(rig.features, rig.labels, owners)]
            for features, labels in records().values() if bounded else ():
                own = [torch.cat([whole, part.repeat(3, *[1] * (part.dim() - 1))])
                       for whole, part in ((rig.features, features), (rig.labels, labels))]  # fmt: skip
                found.append(run.sum(*own, torch.cat([owners, torch.full((3,), 4)])))
            for kind, (gradient, statistics) in zip(records(), found[1:], strict=False):
                moved = float((gradient - found[0][0]).norm())
                allowed = release.sensitivity + ROUNDING * float(found[0][0].norm())
                assert moved <= allowed, (where, kind)
                assert (moved > 0.01 * release.sensitivity) == (kind != "NaN"), (where, kind)
                if combination.is_private and statistics.numel():
                    both = (moved / allowed * release.sensitivity / release.drawn_std) ** 2
                    both += (float((statistics - found[0][1]).norm()) / release.statistics_std) ** 2
                    assert both <= release.sigma**-2 * (1 + ROUNDING), (where, kind)
            run.release()


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_one_record_per_user_is_the_record_level(clipping: str, rig: Rig) -> None:
    """Bit for bit; so is a user whose records are all alike, up to rounding."""
    with under(rig, Combination(clipping)) as run:
        run.begin()
        plain = run.sum(rig.features, rig.labels)
        assert torch.equal(run.sum(rig.features, rig.labels, torch.arange(8))[0], plain[0])
        twice = [tensor.repeat_interleave(2, 0) for tensor in (rig.features, rig.labels)]
        doubled = run.sum(*twice, torch.arange(8).repeat_interleave(2))[0]
        torch.testing.assert_close(doubled, plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", LEGAL_PAIRS, ids="-".join)
@pytest.mark.one_in(6)
def test_noise_drawn_first_is_noise_added_last(names: Any, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a sum begins with its noise changes neither gradient nor ledger."""
    combination = Combination(names[0], names[1], "step", names[2])
    gradients: list[list[Tensor]] = []
    ledgers, filled, added = [], [], []
    for first in (True, False):
        with monkeypatch.context() as patch, under(rig, combination) as run:
            patch.setattr(PrivateStep, "noise_comes_first", lambda self, value=first: value)
            gradients.append([])
            stds = []
            for _ in range(STEPS):
                release = run.begin()
                stds += [release.drawn_std * share for share in release.shares or (1.0,) if share]
                run.sum(rig.features, rig.labels)
                gradients[-1].append(run.release())
            ledgers.append(run.step.state.ledger.entries)
            filled.append(len(rig.noise.filled))
            added.append([std for _, std in rig.noise.added])
    assert ledgers[0] == ledgers[1]
    assert (filled[0] >= STEPS, filled[1]) == (True, 0)
    assert all(std in added[1] and std not in added[0] for std in stds)
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())


@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.one_in(3)
def test_relation_scales_every_noise(clipping: str, relation: str, rig: Rig) -> None:
    """Of the gradient and of the statistics; replacing a record counts twice."""
    for bound in BOUNDS:
        combination = Combination(clipping, bound=bound)
        if combination.refusal:
            continue
        stds = []
        for chosen in ("add_or_remove_one", relation):
            with under(rig, combination, neighboring_relation=chosen) as run:
                release = run.begin()
                run.sum(rig.features, rig.labels)
                run.release()
                stds.append([release.noise_std, release.statistics_std])
                num = int(run.live().sum())
                drawn = stds_of([draw for draw in rig.noise.filled + rig.noise.added if draw[1] > 0])
                assert drawn.numel() in (num, num + 1)
                assert bool((drawn[num:] == release.statistics_std).all())
        assert stds[1] == pytest.approx([std * SENSITIVITY_FACTOR[relation] for std in stds[0]])
        assert stds[0][0] > 0


@each("names", REFUSED)
def test_refused_when_mechanisms_are_checked(names: Any, rig: Rig) -> None:
    for combination in combinations(*names):
        with pytest.raises(ValueError, match=combination.refusal), under(rig, combination):
            raise AssertionError(f"{combination} was accepted")
        assert rig.noise.filled == rig.noise.added == []


def test_known_noise_leaves_no_coordinate_out() -> None:
    noise, tensor = KnownNoise(), torch.zeros(12)
    assert bool((noise.fill_(tensor, 0.5) > 0).all())
    assert bool((noise.add_(tensor, 0.5) >= 1.0).all())
