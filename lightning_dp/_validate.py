"""Checks of arguments. Each error states the condition, the value and a remedy. NaN fails every check of a range."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any


def _given(name: str, value: Any) -> str:
    return f"got {name}={value!r}."


def check_number(name: str, value: Any) -> float:
    """Return an int or a float as a float; refuse other types, bool included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected {name} to be a number, {_given(name, value)} Pass an int or a float.")
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the largest float
        return math.inf if value > 0 else -math.inf


def check_positive(name: str, value: Any) -> float:
    """Check that ``0 < value < inf``, and return the value as a float."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"Expected 0 < {name} < inf, {_given(name, value)} Pass a finite number above 0.")
    return number


def check_nonnegative(name: str, value: Any, hint: str = "Pass a finite number, 0 or above.") -> float:
    """Check that ``0 <= value < inf``, and return the value as a float."""
    number = check_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"Expected 0 <= {name} < inf, {_given(name, value)} {hint}")
    return number


def check_scale(name: str, value: Any, low: float, high: float) -> float:
    """Check that ``low <= value <= high``, so that products of a few such numbers stay finite and nonzero."""
    number = check_number(name, value)
    if not low <= number <= high:
        raise ValueError(
            f"Expected {low:g} <= {name} <= {high:g}, {_given(name, value)} Rescale the loss or the noise."
        )
    return number


def check_probability(name: str, value: Any, hint: str = "Pass a number strictly between 0 and 1.") -> float:
    """Check that ``0 < value < 1``, and return the value as a float."""
    number = check_number(name, value)
    if not 0 < number < 1:
        raise ValueError(f"Expected 0 < {name} < 1, {_given(name, value)} {hint}")
    return number


def check_count(name: str, value: Any, hint: str = "Pass a whole number, 1 or above.") -> int:
    """Check that a value is a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected {name} to be a whole number, {_given(name, value)} {hint}")
    if value < 1:
        raise ValueError(f"Expected {name} >= 1, {_given(name, value)} {hint}")
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Check that a value is one of the named choices."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected {name} to be one of {listed}, {_given(name, value)} Pick one of these.")
    return str(value)


def check_positions(name: str, values: Any, hint: str) -> tuple[int, ...]:
    """Check that all values of a collection are positions 0, 1, ..., and return them as a tuple."""
    positions = tuple(values) if isinstance(values, (list, tuple, set, frozenset, range)) else (None,)
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in positions):
        raise ValueError(f"Expected {name} to hold positions 0, 1, ..., {_given(name, values)} {hint}")
    return positions


def check_kind(name: str, value: Any, kind: Any, hint: str) -> None:
    """Check that a value is an instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be of type {kind.__name__}, got {type(value).__name__}. {hint}")


def check_flag(name: str, value: Any) -> bool:
    """Check that a value is ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected {name} to be True or False, {_given(name, value)} Pass one of these.")
    return value


def check_keywords(given: Mapping[str, Any], known: Collection[str], *, owner: str) -> None:
    """Check that every keyword is an argument of ``owner``; otherwise suggest the nearest one.

    Args:
        given: keyword arguments as passed.
        known: names of the arguments of ``owner``.
        owner: name of the class or function, for the message.

    Raises:
        TypeError: an unknown keyword.

    Example:
        >>> check_keywords({"max_grad_nrom": 1.0}, ["seed", "max_grad_norm"], owner="DPStrategy")
        Traceback (most recent call last):
        TypeError: Expected arguments of DPStrategy, got max_grad_nrom=1.0. Did you mean max_grad_norm?
    """
    unknown = {name: value for name, value in given.items() if name not in known}
    if not unknown:
        return
    nearest = [found[0] for name in unknown if (found := difflib.get_close_matches(name, known, n=1))]
    advice = f"Did you mean {' and '.join(nearest)}?" if nearest else f"There are {', '.join(sorted(known))}."
    got = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
    raise TypeError(f"Expected arguments of {owner}, got {got}. {advice}")
