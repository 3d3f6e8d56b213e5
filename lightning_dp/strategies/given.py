"""A batch or loss as a hook was given it, by which a change in place is found."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.batch_reading import SINGLE, walk
from lightning_dp.system.torch_private import num_changes


@contextmanager
def left_as_given(label: str, given: Any) -> Iterator[None]:
    """Check that a hook of a callback, which runs within the context, leaves a batch or loss as it is.

    Not found are changes through ``.data`` or numpy.

    Args:
        label: of the hook.
        given: batch or loss.

    Raises:
        PrivacyError: a tensor has other values, or a container other entries.
    """
    parts, numbers = _parts_of(given)
    yield
    now, numbers_now = _parts_of(given)
    if len(now) != len(parts) or not all(map(operator.is_, now, parts)) or numbers_now != numbers:
        raise PrivacyError(
            f"Expected {label} to leave batches and losses as they are, got one that it has changed in place. "
            "Callbacks do not run on a few records alone, so it could mix records without a trace: change batches in "
            "on_after_batch_transfer, and losses in training_step."
        )


def _parts_of(given: Any) -> tuple[list[Any], list[Any]]:
    """Return all parts, and the number of changes of each tensor, or the single values in a container."""
    found = [(part, items) for _, part, items in walk(given)]
    return [part for part, _ in found], [
        num_changes(part) if isinstance(part, Tensor) else [each for each in items if type(each[1]) in SINGLE]
        for part, items in found
    ]
