"""Schedules: one contract for every kind, the published formulas, grouping."""

from __future__ import annotations

import math
import pickle

import pytest

from lightning_dp import schedules
from lightning_dp.schedules import Schedule, runs

# schedule, interval; a new schedule enters this table
CONTRACT: dict[str, tuple[Schedule, int]] = {
    "constant": (schedules.constant(), 10**9),
    "step": (schedules.step(0.9, every=7), 7),
    "step-rate": (schedules.step(rate=0.9, every=7), 7),
    "exponential": (schedules.exponential(0.99, every=5), 5),
    "exponential-rate": (schedules.exponential(rate=0.01, every=5), 5),
    "linear": (schedules.linear(final=0.3, over=100), 1),
    "linear-rate": (schedules.linear(rate=0.99, every=3), 3),
    "time": (schedules.time(rate=0.5, every=4), 4),
    "cosine": (schedules.cosine(final=0.2, over=100, every=10), 10),
    "growing": (schedules.linear(final=3.0, over=50, every=5), 5),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name: str) -> None:
    schedule, every = CONTRACT[name]
    values = [schedule(step) for step in range(300)]
    assert values[0] == 1.0
    assert all(isinstance(value, float) and 0 < value < math.inf for value in values)
    assert all(values[step] == values[step - step % every] for step in range(300))
    falling = values == sorted(values, reverse=True)
    assert falling if name != "growing" else values == sorted(values)
    twin = pickle.loads(pickle.dumps(schedule))
    assert [twin(step) for step in range(300)] == values
    assert twin == schedule


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_rate_acts_on_the_variance(epoch: int) -> None:
    every, rate = 6, 0.36
    for step in (epoch * every, epoch * every + every - 1):
        assert schedules.linear(rate=rate, every=every)(step) ** 2 == pytest.approx(rate**epoch)
        assert schedules.time(rate=rate, every=every)(step) ** 2 == pytest.approx(1 / (1 + rate * epoch))
        assert schedules.exponential(rate=rate, every=every)(step) ** 2 == pytest.approx(math.exp(-rate * epoch))
        assert schedules.step(rate=rate, every=every)(step) ** 2 == pytest.approx(rate ** math.floor(step / every))


def test_factor_acts_on_sigma() -> None:
    assert [schedules.step(0.5, every=2)(t) for t in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert schedules.exponential(0.5)(3) == 0.125
    assert schedules.step(0.6)(2) == pytest.approx(schedules.step(rate=0.36)(2))


def test_ramps_end_where_they_say() -> None:
    line, wave = schedules.linear(final=0.5, over=8), schedules.cosine(final=0.5, over=8)
    assert [line(t) for t in (0, 4, 8, 100)] == [1.0, 0.75, 0.5, 0.5]
    assert [wave(t) for t in (0, 8, 100)] == [1.0, 0.5, 0.5]
    assert wave(2) == pytest.approx(1 - 0.5 * (1 - math.cos(math.pi / 4)) / 2)
    assert wave(2) > line(2)


def test_constant_is_the_value_it_is_given() -> None:
    assert schedules.constant()(5) == 1.0
    assert schedules.constant(0.7)(10**6) == 0.7


def test_runs_groups_exactly_equal_neighbours() -> None:
    assert runs(schedules.step(0.5, every=3), 0, 7) == [(1.0, 3), (0.5, 3), (0.25, 1)]
    assert runs(schedules.step(0.5, every=3), 2, 4) == [(1.0, 1), (0.5, 1)]
    assert runs(lambda step: 1.0 if step % 2 else 2.0, 0, 3) == [(2.0, 1), (1.0, 1), (2.0, 1)]
    assert runs(lambda step: 1.0 + (step % 2) * 2.0**-52, 0, 2) == [(1.0, 1), (1.0 + 2.0**-52, 1)]
    assert runs(schedules.constant(), 4, 4) == []


@pytest.mark.parametrize("name", CONTRACT)
def test_runs_gives_back_every_step(name: str) -> None:
    schedule, _ = CONTRACT[name]
    expanded = [value for value, count in runs(schedule, 13, 200) for _ in range(count)]
    assert expanded == [schedule(step) for step in range(13, 200)]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 3])
def test_runs_refuses_values_without_an_epsilon(value: float, position: int) -> None:
    with pytest.raises(ValueError, match=f"got value={value} at step={position}"):
        runs(lambda step: value if step == position else 1.0, 0, 5)


def test_runs_refuses_underflow_and_overflow() -> None:
    with pytest.raises(ValueError, match=r"value=0\.0 at step="):
        runs(schedules.exponential(0.5), 0, 2000)
    with pytest.raises(ValueError, match="value=inf at step="):
        runs(schedules.exponential(2.0), 0, 2000)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 3)])
def test_runs_refuses_a_range_that_is_none(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        runs(schedules.constant(), start, stop)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_arguments_out_of_range_are_refused(bad: float) -> None:
    for make, name in (
        (lambda: schedules.constant(bad), "value"),
        (lambda: schedules.step(bad), "factor"),
        (lambda: schedules.step(rate=bad), "rate"),
        (lambda: schedules.exponential(bad), "factor"),
        (lambda: schedules.exponential(rate=bad), "rate"),
        (lambda: schedules.linear(final=bad, over=3), "final"),
        (lambda: schedules.linear(rate=bad), "rate"),
        (lambda: schedules.time(bad), "rate"),
        (lambda: schedules.cosine(bad, over=3), "final"),
    ):
        with pytest.raises(ValueError, match=f"{name}={bad}"):
            make()


def test_zero_is_refused_where_noise_would_vanish() -> None:
    for make in (
        lambda: schedules.constant(0.0),
        lambda: schedules.step(0.0),
        lambda: schedules.linear(final=0.0, over=3),
        lambda: schedules.cosine(0.0, over=3),
    ):
        with pytest.raises(ValueError, match=r"Expected 0 < \w+ < inf"):
            make()


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_intervals_must_be_whole_steps(every: int) -> None:
    with pytest.raises(ValueError, match=f"every={every}"):
        schedules.step(0.9, every=every)
    with pytest.raises(ValueError, match=f"over={every}"):
        schedules.cosine(0.9, over=every)


def test_arguments_that_do_not_belong_together_are_refused() -> None:
    for make in (
        lambda: schedules.step(),
        lambda: schedules.step(0.9, rate=0.81),
        lambda: schedules.exponential(0.9, rate=0.81),
        lambda: schedules.linear(),
    ):
        with pytest.raises(ValueError, match="Expected exactly one of"):
            make()
    with pytest.raises(ValueError, match=r"over=None with rate"):
        schedules.linear(rate=0.9, over=10)
    with pytest.raises(ValueError, match=r"over=None"):
        schedules.linear(final=0.5)
