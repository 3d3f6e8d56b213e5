"""Users who own several records: the records of each user, and the choice of those that join a batch."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_dp.sampling.randomness import fresh_randomness

_AGAIN = 16  # items that are read twice
_BY_IDENTITY: Any = object.__eq__

Unit = int | str | Sequence[Any] | Tensor | NDArray[Any]


class Units:
    """The records of every user, and the most records that a user contributes.

    **Guarantee**: whoever joins brings at least one and at most ``most`` records, a uniform subset without replacement,
    independent between users and steps. Who owns what is private.

    Args:
        ids: one id per record, hashable and comparable. Users are numbered by their first record.
        most: G >= 1, most records that a user brings to one logical batch.

    Raises:
        TypeError: an id that cannot be hashed.
        ValueError: an id that is missing (None or NaN).

    Example:
        >>> units = Units(["ann", "bob", "ann"], most=1)
        >>> len(units), units.choose(np.array([1]), np.random.default_rng(0))
        (2, ([1], [1]))
    """

    def __init__(self, ids: Sequence[Any], most: int) -> None:
        numbers: dict[Any, int] = {}
        owners = np.empty(len(ids), dtype=np.int64)
        for record, identity in enumerate(ids):
            if identity is None or identity != identity:
                raise ValueError(
                    f"Expected an id for every record, got {identity!r} for record {record}. Give records without a "
                    "user an id of their own."
                )
            try:
                owners[record] = numbers.setdefault(identity, len(numbers))
            except TypeError as error:
                raise TypeError(
                    f"Expected ids that can be hashed, got {type(identity).__name__} for record {record}. Pass numbers "
                    "or strings."
                ) from error
        self.most, self.owners = most, owners
        """Largest number of records that a user brings, and the number of each record's user."""
        self._records = np.argsort(owners, kind="stable")
        self._edges = np.searchsorted(owners[self._records], np.arange(len(numbers) + 1))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def choose(self, users: NDArray[Any], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Draw records of these users; return the records, user by user, and the number of records per user.

        Args:
            users: numbers of the users, in the order of the batch.
            rng: generator of the choice.

        Returns:
            Indices into the dataset, in its order within a user, and one count >= 1 per user; private.
        """
        records: list[int] = []
        sizes: list[int] = []
        for user in users.tolist():
            own = self._records[self._edges[user] : self._edges[user + 1]]
            if len(own) > self.most:
                own = own[np.sort(rng.choice(len(own), size=self.most, replace=False, shuffle=False))]
            records.extend(own.tolist())
            sizes.append(len(own))
        return records, sizes


def unit_ids(dataset: Any, size: int, unit: Unit, *, warn: bool) -> list[Any]:
    """Return the user id of every record of a dataset.

    Items are read only if ``unit`` is a key or a position and the dataset keeps no such column: then each once, with a
    warning, and a few again to see that their ids stay.

    Args:
        dataset: with random access.
        size: its number of records.
        unit: one id per record; or the key (of mappings) or position (of tuples) at which an item holds its user's id.
        warn: whether to warn before reading all items.

    Returns:
        ``size`` ids, private.

    Raises:
        ValueError: another number of ids, items without that key or position, or ids of several types.
        TypeError: ids that are compared by identity.
    """
    if not isinstance(unit, (int, str)):
        ids, source = _plain(unit), "unit"
    else:
        column = _column(dataset, unit)
        ids, source = _read(dataset, size, unit, warn) if column is None else column, f"column {unit!r}"
    if len(ids) != size:
        raise ValueError(
            f"Expected one id per record in {source}, got {len(ids)} ids for {size} records. Pass one for each."
        )
    return _checked(ids, source)


def _column(dataset: Any, unit: int | str) -> list[Any] | None:
    """Return a column stored by the dataset, or None if its items must be read."""
    if type(dataset) is Subset:
        whole = _column(dataset.dataset, unit)
        return None if whole is None else [whole[index] for index in _plain(dataset.indices)]
    if type(dataset) is ConcatDataset:
        parts = [_column(part, unit) for part in dataset.datasets]
        return None if None in parts else [identity for part in parts for identity in part or ()]
    if (
        type(dataset) is TensorDataset
        and isinstance(unit, int)
        and -len(dataset.tensors) <= unit < len(dataset.tensors)
    ):
        return _plain(dataset.tensors[unit])
    names = getattr(dataset, "column_names", None)
    return _plain(dataset[unit]) if isinstance(names, (list, tuple)) and unit in names else None


def _read(dataset: Any, size: int, unit: int | str, warn: bool) -> list[Any]:
    if warn:
        warnings.warn(
            f"Reading all {size} records once to find their users at {unit!r}, since {type(dataset).__name__} keeps no "
            "such column. Pass the ids as an array to start at once.",
            stacklevel=4,
        )
    ids = []
    with fresh_randomness(secrets.randbits(128)):
        for index in range(size):
            try:
                found = dataset[index][unit]
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"Expected items that hold their user's id at unit={unit!r}, got {type(error).__name__} for record "
                    f"{index} of {type(dataset).__name__}. Pass the ids as an array."
                ) from error
            ids.append(found.item() if hasattr(found, "item") else found)
        for index in range(min(size, _AGAIN)):
            again = dataset[index][unit]
            if (again.item() if hasattr(again, "item") else again) != ids[index] == ids[index]:
                raise ValueError(
                    f"Expected items that keep their user's id at unit={unit!r}, got {ids[index]!r} and then {again!r} "
                    f"for record {index}. Its record would be taken for another user's: pass the ids as an array."
                )
    return ids


def _checked(ids: list[Any], source: str) -> list[Any]:
    """Return ids that are compared by value, all of one type, so that no user is taken for several."""
    ids = [each.item() if hasattr(each, "item") and getattr(each, "ndim", 0) == 0 else each for each in ids]
    kinds: dict[type, Any] = {}
    for identity in ids:
        kind: type = type(identity)
        if kind is float and identity.is_integer() and abs(identity) < 2**24:
            kind = int
        kinds.setdefault(int if kind is bool else kind, identity)
    for kind, identity in kinds.items():
        if kind is float and identity == identity:
            raise ValueError(
                f"Expected ids that are exact, got {identity!r} in {source}. Rounding may join or split users: pass "
                "whole numbers or strings."
            )
        held = identity if kind is tuple else (identity,)
        if any(isinstance(each, Tensor) or type(each).__eq__ is _BY_IDENTITY for each in held if each is not None):
            raise TypeError(
                f"Expected ids that are compared by value, got {kind.__name__} in {source}. Those of one user would "
                "count as several users: pass numbers or strings."
            )
    named = sorted(kind.__name__ for kind, identity in kinds.items() if identity is not None and identity == identity)
    if len(named) > 1:
        raise ValueError(
            f"Expected ids of one type, got {' and '.join(named)} in {source}. 7 and '7' would be two users: convert "
            "them."
        )
    return ids


def _plain(values: Any) -> list[Any]:
    """Return an array, tensor, series or sequence as a list of Python values."""
    plain: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    return plain
