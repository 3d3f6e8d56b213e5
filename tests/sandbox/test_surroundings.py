"""Surroundings: what a module's step may set on objects of the framework."""

from __future__ import annotations

from collections import UserList
from typing import Any

import lightning as L
import pytest

from lightning_dp.sandbox.surroundings import Surroundings
from lightning_dp.sandbox.user_variables import UserVariables


class Joining(UserList[Any]):
    """Refuses to be joined to another list, as the lists of some configurations do."""

    def __radd__(self, other: Any) -> Any:
        raise TypeError("not a primitive type")


class Unreadable(UserList[Any]):
    def __iter__(self) -> Any:
        raise TypeError("no value")


def marks(callback: Any) -> None:
    callback.seen = True


@pytest.mark.parametrize(("kind", "expected"), [(list, [True]), (Joining, [True]), (Unreadable, [])])
def test_containers_of_any_kind_are_looked_through(kind: Any, expected: list[bool]) -> None:
    callback = L.Callback()
    around = Surroundings([kind([callback])], [], UserVariables([marks]))
    marks(callback)
    assert [value for view in around.watched for value in view.copy().values()] == expected
