"""The length of a run: what needs it says so in one way."""

from __future__ import annotations

import pytest

from lightning_dp.run_length import RunLength


def test_lengths_that_are_known_are_returned() -> None:
    length = RunLength(steps=12, steps_per_epoch=4)
    assert (length.total_steps("x"), length.epoch_steps("x", "")) == (12, 4)


def test_lengths_that_are_unknown_are_refused() -> None:
    length = RunLength(steps=None, steps_per_epoch=None)
    with pytest.raises(ValueError, match=r"Expected a bounded run with X, got steps=None\. Set `Trainer\(max_epochs"):
        length.total_steps("X")
    with pytest.raises(ValueError, match=r"number of steps per epoch with X, got a stream without a length\. Pass Y\."):
        length.epoch_steps("X", "Pass Y.")
