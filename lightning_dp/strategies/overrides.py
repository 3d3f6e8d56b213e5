"""Attributes that are replaced on instances while a fit runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Overrides:
    """Attributes of other people's objects, each replaced on the instance and later put back as it was there.

    A function that is put in place of a method stays with its owner: copies and pickles of the owner, such as those of
    a logger among the hyperparameters of a checkpoint, have the owner's own method.

    Example:
        >>> import copy
        >>> class Greeter:
        ...     def greet(self) -> str:
        ...         return "hello"
        >>> one, overrides = Greeter(), Overrides()
        >>> overrides.set(one, "greet", lambda: "hi")
        >>> one.greet(), copy.deepcopy(one).greet()
        ('hi', 'hello')
        >>> overrides.undo()
        >>> one.greet(), vars(one)
        ('hello', {})
    """

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute on an instance."""
        own = owner.__dict__
        self._before.append((own, name, own.get(name, _ABSENT)))
        own[name] = _Replacement(owner, name, value) if callable(getattr(owner, name, None)) else value

    def undo(self) -> None:
        """Put every attribute back, the latest first; what the instance did not have is deleted."""
        while self._before:
            own, name, value = self._before.pop()
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


class _Replacement:
    """A function in place of a method of one instance; a copy of the instance has the instance's own method.

    Args:
        owner: the instance.
        name: of the method.
        call: the function.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, call)
        self._owner, self._name, self._call = owner, name, call
        self._own = vars(owner).get(name, _ABSENT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (getattr, (self._owner, self._name)) if self._own is _ABSENT else (_as_it_was, (self._own,))


def _as_it_was(own: Any) -> Any:
    return own
