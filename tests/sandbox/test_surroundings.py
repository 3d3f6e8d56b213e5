"""Surroundings: what a module's step may set on objects of the framework."""

from __future__ import annotations

from collections import UserList
from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp.sandbox.names import Names
from lightning_dp.sandbox.process_settings import process_settings
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


def test_methods_of_backends_are_no_settings() -> None:
    """Each reading would give another bound method, and none can be set, as peft's layers showed."""

    def step(module: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        setattr(module, "__repr__", None)  # noqa: B010

    (settings,) = process_settings(Names(step.__code__), [])
    assert [*settings] == ["allow_tf32 of CudnnModule", "allow_tf32 of cuBLASModule"]
