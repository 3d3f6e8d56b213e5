"""Repeat check: a dataset has no more positions than records, as it has if positions are folded (``index % n``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling.checks import dataset_length, sources
from lightning_dp.sampling.gather import is_plain
from lightning_dp.trials.reading import alike, content_of, read_under

#: Pairs of positions that hold equal items, where the items of different pairs differ.
_PAIRS = 8
_MOST_LENGTHS = 8
Fold = tuple[Callable[[NDArray[Any]], NDArray[Any]], list[tuple[int, int]]]
"""What a dataset may make of positions, and pairs of positions that are then one."""


def check_repeats(dataset: Any) -> None:
    """Check that a dataset does not return one record at several positions.

    Tried are ``index % n`` and ``index // k``, for each n below the dataset's length that is the length of something
    that it holds, and k = length / n or 2. Random draws are the same for all items. A dataset that holds a list of its
    own length has as many records, of which some may be equal. NOT found: records that are not held in the dataset
    itself, at positions of another order, such as those that an index of weights repeats, or drawn at random.

    Args:
        dataset: with random access.

    Raises:
        PrivacyError: a record is at several positions, so it joins a batch more often than the ledger counts.
    """
    for source, positions in sources(dataset, np.arange(dataset_length(dataset))):
        if is_plain(source):
            continue
        for fold, pairs in _folds(source):
            if len(np.unique(fold(positions))) < len(positions) and _are_equal(source, pairs):
                one, other = pairs[0]
                raise PrivacyError(
                    f"Expected a dataset with each record at one position, got equal records at {one} and {other}, and "
                    f"at {len(pairs) - 1} more pairs like it. Such a record joins batches more often than the ledger "
                    "counts: return the number of records as the length and train for more epochs, or pass unit and "
                    "records_per_unit, with equal ids for copies."
                )


def _folds(source: Any) -> Iterator[Fold]:
    size = dataset_length(source)
    held = {*map(_length, getattr(source, "__dict__", {}).values())}
    if size in held:  # it lists its records, of which some may be equal
        return
    lengths = sorted(each for each in held if _PAIRS <= each <= size - _PAIRS)[-_MOST_LENGTHS:]
    for length in lengths:
        yield partial(_rest, by=length), [(at, at + length) for at in range(_PAIRS)]
    for times in {2, *(size // length for length in lengths)} if lengths else ():
        if 2 <= times <= (apart := size // _PAIRS):
            firsts = [at * apart // times * times for at in range(_PAIRS)]
            yield partial(_quotient, by=times), [(first, first + 1) for first in firsts]


def _length(held: Any) -> int:
    """Return the length of a sequence; 0 for other objects, such as numbers of numpy."""
    try:
        return len(held) if hasattr(held, "__getitem__") else 0
    except Exception:
        return 0


def _rest(index: NDArray[Any], by: int) -> NDArray[Any]:
    return index % by


def _quotient(index: NDArray[Any], by: int) -> NDArray[Any]:
    return index // by


def _are_equal(source: Any, pairs: list[tuple[int, int]]) -> bool:
    """Tell whether the items of each pair are equal, and those of different pairs are not."""

    def item(position: int) -> list[Any]:
        return content_of(read_under(source, [position], 0)[0], source)

    firsts: list[list[Any]] = []
    try:
        for one, other in pairs:
            first = item(one)
            if any(alike(first, earlier) for earlier in firsts) or not alike(first, item(other)):
                return False
            firsts.append(first)
    except Exception:  # an item that cannot be read is left to the step that draws it
        return False
    return True
