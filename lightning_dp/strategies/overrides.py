"""Attributes that are replaced on instances while a fit runs."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Overrides:
    """Attributes of other people's objects, each replaced on the instance and later put back as it was there.

    Example:
        >>> class Greeter:
        ...     def greet(self) -> str:
        ...         return "hello"
        >>> one, overrides = Greeter(), Overrides()
        >>> overrides.set(one, "greet", lambda: "hi")
        >>> one.greet()
        'hi'
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
        own[name] = value

    def undo(self) -> None:
        """Put every attribute back, the latest first; what the instance did not have is deleted."""
        while self._before:
            own, name, value = self._before.pop()
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value
