"""Every kind of clipping, mask, bound, rule and accountant is in the tables that the contracts run over."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import lightning_dp
from lightning_dp.accounting import ACCOUNTANTS, Accountant
from lightning_dp.clipping import Clipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.masks import GradientMask
from lightning_dp.per_sample.rules import Rule, registered
from lightning_dp.per_sample.tracking.leaves import LeafRule
from lightning_dp.per_sample.tracking.registered import Registered
from lightning_dp.per_sample.tracking.replaying import Replayed
from tests.clipping.table import CONTRACT
from tests.step.composition.table import BOUNDS, MASKS
from tests.step.rig import Rig
from tests.step.test_contract import CLIPPINGS, rig

__all__ = ["rig"]

# ---------------------------------------------------------------- nothing is missing from the table


def concrete(base: type) -> set[type]:
    """Every final class of the package below ``base``, whatever module it is in."""
    for module in pkgutil.walk_packages(lightning_dp.__path__, "lightning_dp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: set[type] = set()
    ahead = [base]
    while ahead:
        kind: type
        for kind in ahead.pop().__subclasses__():
            ahead.append(kind)
            if kind.__module__.startswith("lightning_dp.") and not inspect.isabstract(kind):
                found.add(kind)
    return {kind for kind in found if not kind.__name__.startswith("_")}


def asked_for(callbacks: Callable[[], list[Any]], what: str, rig: Rig) -> set[type]:
    """Classes of what callbacks of a table hand over."""
    with rig.under(CLIPPINGS["flat"](), callbacks()) as run:
        mechanisms = run.step.mechanisms
        return {type(value) for value in (mechanisms.masks if what == "mask" else [mechanisms.bound])}


def test_every_clipping_is_in_the_tables() -> None:
    assert {type(make()) for make in CLIPPINGS.values()} == concrete(Clipping)
    assert {type(clipping) for clipping, _ in CONTRACT} == concrete(Clipping)


def test_every_mask_is_in_the_table(rig: Rig) -> None:
    assert set().union(*(asked_for(make, "mask", rig) for make in MASKS.values())) == concrete(GradientMask)


def test_every_bound_is_in_the_table(rig: Rig) -> None:
    assert set().union(*(asked_for(make, "bound", rig) for make in BOUNDS.values())) == concrete(Bound) | {Bound}


def test_every_rule_is_registered_or_the_one_for_leaves() -> None:
    """``tests/per_sample/test_rounding.py`` runs its contract over these; others are made for single operations."""
    assert concrete(Rule) == {*registered(), LeafRule, Registered, Replayed}


def test_every_accountant_is_in_the_registry() -> None:
    assert {type(make()) for make in ACCOUNTANTS.values()} == concrete(Accountant)
