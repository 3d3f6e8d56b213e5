"""Two fits whose steps alternate: the ratio does not show how fast the machine is at the time."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from benchmarks import in_turn


class Machine:
    """A machine that is slower with each block of steps.

    Args:
        ends_after: blocks.
    """

    def __init__(self, ends_after: int = 10**6) -> None:
        self.blocks: list[tuple[str, int]] = []
        self._ends_after = ends_after

    def side(self, name: str, seconds: float) -> Callable[[int], list[float]]:
        def steps(num: int) -> list[float]:
            if len(self.blocks) == self._ends_after:
                raise in_turn.FitEnded
            self.blocks.append((name, num))
            slowness = 1.01 ** len(self.blocks)
            return [seconds * slowness] * (num - 1) + [100.0]  # a step with a check

        return steps


def test_ratios_are_those_of_neighbours() -> None:
    machine = Machine()
    ratios, block = in_turn.compare(8, machine.side("plain", 0.001), machine.side("private", 0.003))
    assert block == in_turn.MOST
    assert ratios == pytest.approx([3 / 1.01, 3 * 1.01] * 4)
    counted = [name for name, num in machine.blocks if num == block]
    assert counted == ["private", "plain", "plain", "private"] * 4
    assert sum(num for name, num in machine.blocks if name == "plain") == in_turn.WARM_STEPS + 8 * block


def test_slow_steps_make_short_blocks() -> None:
    machine = Machine()
    assert in_turn.compare(2, machine.side("plain", 0.5), machine.side("private", 1.0))[1] == in_turn.LEAST


def test_a_fit_that_ends_leaves_the_pairs_until_then() -> None:
    machine = Machine(ends_after=2 * in_turn.WARM_STEPS // in_turn.LEAST + 5)
    assert len(in_turn.compare(8, machine.side("plain", 0.001), machine.side("private", 0.003))[0]) == 2


def test_a_side_takes_steps_as_it_is_told() -> None:
    """Output of a package is no answer; the end of the process is an error."""
    serve = (
        "import sys; print('steps: ')\n"
        "for line in iter(sys.stdin.readline, ''):\n"
        "    if line == '9\\n': break\n"
        "    print('chatter'); print('steps: ' + ' '.join(['0.5'] * int(line)), flush=True)\n"
    )
    with in_turn.Side([sys.executable, "-u", "-c", serve]) as side:
        assert [side.steps(num) for num in (1, 2)] == [[0.5], [0.5, 0.5]]
        with pytest.raises(in_turn.FitEnded):
            side.steps(9)
