"""The hand-over of mechanisms: who owns what, what is off, and what cannot be combined."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.auditing import Canaries, GradientCanaries
from lightning_dp.clipping import FlatClipping, NoClipping, TopAgg
from lightning_dp.clipping.bounds import NoisyGradientBound, PublishedBound, ScheduledBound
from lightning_dp.masks import GradientMask
from lightning_dp.reporting.files import CardFiles
from lightning_dp.run_length import RunLength
from lightning_dp.step.diagnostics import ClippingDiagnostics
from lightning_dp.step.limit import EpsilonLimit
from lightning_dp.step.mechanisms import Mechanisms

LENGTH = RunLength(steps=12, steps_per_epoch=4)


class Owner:
    """A callback with public and private attributes."""

    def __init__(self, rate: float = 0.5) -> None:
        self.rate, self._hidden = rate, 3


class Other(Owner):
    """Another one."""


class FirstSteps(GradientMask):
    """Everything is active until a step."""

    def __init__(self, until: int) -> None:
        self.until = until

    def version(self, step: int) -> Hashable:
        return step < self.until

    def live(self, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        return {name: torch.full(p.shape, step < self.until) for name, p in parameters.items()}


#: One value of each kind that a callback can ask for; a new kind that is missing here fails a test.
KINDS: dict[str, Any] = {
    "noise_schedule": lambda length: lambda step: 0.5,
    "is_private": lambda length: lambda step: step > 1,
    "bound": NoisyGradientBound(1.0),
    "mask": lambda length: FirstSteps(length.steps),
    "canaries": GradientCanaries(2),
    "diagnostics": ClippingDiagnostics(),
    "limit": EpsilonLimit(1.0),
    "extra_records": lambda: [1, 2],
    "card": CardFiles(enabled=False),
}


def test_kinds_are_all_in_the_table() -> None:
    accepted = Mechanisms.add.__kwdefaults__
    assert accepted is not None
    assert accepted.keys() == KINDS.keys()


def test_off_is_an_object_that_does_nothing() -> None:
    mechanisms = Mechanisms()
    mechanisms.begin_run(LENGTH)
    assert [mechanisms.noise_schedule(LENGTH)(step) for step in (0, 11)] == [1.0, 1.0]
    assert all(mechanisms.is_private(LENGTH)(step) for step in (0, 11))
    assert not mechanisms.sometimes_plain
    assert mechanisms.never_private == ""
    assert (mechanisms.bound.is_fixed, mechanisms.bound.sees_releases, mechanisms.bound.figures) == (True, False, {})
    assert (mechanisms.canaries.reads_sums, mechanisms.canaries.needs_factors) == (False, False)
    assert not mechanisms.diagnostics.reads_sums
    assert (tuple(mechanisms.masks), tuple(mechanisms.extra_records)) == ((), ())
    assert mechanisms.limit.last_step(None) == float("inf")  # type: ignore[arg-type]
    assert mechanisms.card == CardFiles(enabled=True, directory=None, fallback=None)
    assert mechanisms.described() == ()
    for clipping in (FlatClipping(1.0), NoClipping(), TopAgg(3)):
        mechanisms.check(clipping, target_epsilon=1.0, num_private_optimizers=2)


@pytest.mark.parametrize("kind", KINDS)
def test_add_hands_over_one_thing_and_leaves_the_rest(kind: str) -> None:
    mechanisms, untouched = Mechanisms(), Mechanisms()
    mechanisms.add(Owner(), **{kind: KINDS[kind]})
    mechanisms.begin_run(LENGTH)
    if kind == "mask":
        assert [mask.until for mask in mechanisms.masks] == [12]  # type: ignore[attr-defined]
    elif kind == "extra_records":
        assert mechanisms.extra_records == [1, 2]
    else:
        assert getattr(mechanisms, kind) is KINDS[kind]
    for other in KINDS.keys() - {kind, "mask"}:
        assert getattr(mechanisms, other) is getattr(untouched, other)
    assert mechanisms.sometimes_plain == (kind == "is_private")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mask"])
def test_second_owner_of_one_thing_is_refused(kind: str) -> None:
    mechanisms = Mechanisms()
    mechanisms.add(Owner(), **{kind: KINDS[kind]})
    with pytest.raises(ValueError, match=r"Expected one callback for the .*, got Owner and Other\. Leave one"):
        mechanisms.add(Other(), **{kind: KINDS[kind]})
    assert getattr(mechanisms, kind) == KINDS[kind] or mechanisms.extra_records == [1, 2]


def test_equal_owners_are_two_owners() -> None:
    """Identity decides: two callbacks that compare equal are still two."""

    class Equal:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = None  # type: ignore[assignment]

    mechanisms = Mechanisms()
    mechanisms.add(Equal(), bound=NoisyGradientBound(1.0))
    with pytest.raises(ValueError, match="Expected one callback for the clipping bound, got Equal and Equal"):
        mechanisms.add(Equal(), bound=NoisyGradientBound(1.0))


def test_masks_of_several_owners_combine_in_order() -> None:
    mechanisms = Mechanisms()
    for until in (3, 5):
        mechanisms.add(Owner(until), mask=lambda length, until=until: FirstSteps(until))
    assert mechanisms.masks == ()
    mechanisms.begin_run(LENGTH)
    assert [mask.until for mask in mechanisms.masks] == [3, 5]  # type: ignore[attr-defined, var-annotated]


def test_same_owner_replaces_what_it_asked_for_before() -> None:
    mechanisms, owner = Mechanisms(), Owner()
    mechanisms.add(owner, bound=NoisyGradientBound(1.0), mask=KINDS["mask"])
    bound = NoisyGradientBound(2.0)
    mechanisms.add(owner, bound=bound)
    mechanisms.begin_run(LENGTH)
    assert mechanisms.bound is bound
    assert mechanisms.masks == ()


def test_remove_drops_what_one_owner_asked_for() -> None:
    mechanisms, owner = Mechanisms(), Owner()
    mechanisms.add(owner, limit=KINDS["limit"])
    mechanisms.add(Other(), canaries=KINDS["canaries"])
    mechanisms.remove(owner)
    mechanisms.remove(owner)
    assert mechanisms.limit.last_step(None) == float("inf")  # type: ignore[arg-type]
    assert mechanisms.canaries is KINDS["canaries"]


def test_add_after_the_plan_is_refused() -> None:
    mechanisms = Mechanisms()
    mechanisms.begin_run(LENGTH)
    with pytest.raises(RuntimeError, match=r"Owner asked for a mechanism after the plan .* in the callback's setup"):
        mechanisms.add(Owner(), mask=KINDS["mask"])


def test_begin_run_settles_masks_and_bound_again() -> None:
    mechanisms = Mechanisms()
    mechanisms.add(Owner(), mask=KINDS["mask"], bound=ScheduledBound(lambda length: lambda step: length.steps / 4))
    for steps in (8, 2):
        mechanisms.begin_run(RunLength(steps, None))
        assert [mask.until for mask in mechanisms.masks] == [steps]  # type: ignore[attr-defined]
        assert mechanisms.bound.clipping(FlatClipping(1.0), 0, 1).sensitivity(1) == steps / 4


def test_extra_records_are_asked_for_when_they_are_read() -> None:
    """A checkpoint that is read after setup may change them."""
    mechanisms, records = Mechanisms(), [1]
    mechanisms.add(Owner(), extra_records=lambda: list(records))
    records.append(2)
    assert mechanisms.extra_records == [1, 2]


def test_described_names_what_is_decided_with_public_numbers() -> None:
    mechanisms = Mechanisms()
    mechanisms.add(Owner(0.25), mask=KINDS["mask"], limit=KINDS["limit"])
    mechanisms.add(Other(), bound=KINDS["bound"], canaries=KINDS["canaries"], card=KINDS["card"])
    assert mechanisms.described() == ("the clipping bound: Other(rate=0.5)", "the gradient mask: Owner(rate=0.25)")


@pytest.mark.parametrize(
    ("asked", "clipping", "target", "optimizers", "message"),
    [
        ({"is_private": KINDS["is_private"]}, FlatClipping(1.0), 1.0, 1, "target_epsilon=1, got steps of plain SGD"),
        ({"bound": PublishedBound()}, FlatClipping(1.0), 1.0, 1, "got published automatic threshold"),
        ({"diagnostics": ClippingDiagnostics()}, FlatClipping(1.0), None, 2, "one private optimizer with Owner, got 2"),
        ({"canaries": GradientCanaries(2)}, TopAgg(3), None, 1, "Expected a clipping by a factor with canaries"),
        ({"bound": NoisyGradientBound(1.0)}, NoClipping(), None, 1, "a clipping with a bound for Owner to move, got"),
        ({"bound": PublishedBound()}, TopAgg(3), None, 1, "Expected a clipping by a factor with Owner, got"),
        ({"bound": NoisyGradientBound(1.0)}, FlatClipping(1.0), None, 2, "one private optimizer with Owner, got 2"),
    ],
)
def test_check_refuses_what_cannot_be_combined(
    asked: dict[str, Any], clipping: Any, target: float | None, optimizers: int, message: str
) -> None:
    mechanisms = Mechanisms()
    mechanisms.add(Owner(), **asked)
    with pytest.raises(ValueError, match=message):
        mechanisms.check(clipping, target_epsilon=target, num_private_optimizers=optimizers)


def test_check_allows_a_schedule_for_several_optimizers() -> None:
    mechanisms = Mechanisms()
    mechanisms.add(Owner(), bound=ScheduledBound(lambda length: lambda step: 0.5), canaries=Canaries())
    mechanisms.check(FlatClipping(1.0), target_epsilon=1.0, num_private_optimizers=2)
