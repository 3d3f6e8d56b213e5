"""Many quick cases as one test: pytest takes longer to start a test, and to report it, than such a case runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


def each(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with every case in turn, each with the same weights; name the case that fails.

    For cases that leave nothing in a fixture.

    Args:
        names: of the arguments, separated by commas.
        cases: a value, or as many values as there are names.
    """
    taken, given = [name.strip() for name in names.split(",")], list(cases)
    assert given, "a test without a case"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in taken]
        assert len(left) + len(taken) == len(signature.parameters), f"{test.__name__} does not take {names}"

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for case in given:
                values = dict(zip(taken, case if len(taken) > 1 else [case], strict=True))
                torch.default_generator.manual_seed(0)
                try:
                    test(**fixtures, **values)
                except Exception as error:
                    error.add_note(f"in the case {values!r}")
                    raise

        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        return run

    return decorate
