"""The calls of torch in user code, as a listener hears of them.

A mode that is there anyway tells it: each further mode costs about a microsecond per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from lightning_dp.per_sample._torch import innermost_mode

Hear = Callable[[Any, Any, Any], None]
"""Hears of a call: the function, its arguments, and its arguments by name."""


class Telling(TorchFunctionMode):
    """A mode that calls :attr:`hear`, if it is set, for each call that may show an entry of a tensor; but not for one
    within a call that the mode takes apart, while ``_depth`` is above 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self.hear: Hear | None = None

    def __enter__(self) -> Self:
        self._depth += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _Hearing(TorchFunctionMode):
    """A mode that tells of calls, and does nothing else.

    Args:
        hear: hears of each call.
    """

    def __init__(self, hear: Hear) -> None:
        super().__init__()
        self._hear = hear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._hear(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def telling(hear: Hear) -> Iterator[None]:
    """Tell, within the context, of each call of torch that may show an entry of a tensor."""
    mode = innermost_mode()
    if not isinstance(mode, Telling):
        with _Hearing(hear):
            yield
        return
    before, mode.hear = mode.hear, hear
    try:
        yield
    finally:
        mode.hear = before
