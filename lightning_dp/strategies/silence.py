"""Silence of user code on trial: ``self.log``, ``self.print``, and views of loggers to which nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.strategies import _lightning
from lightning_dp.strategies.outcomes import TrialFigures
from lightning_dp.strategies.overrides import Overrides

_PLAIN = (str, bytes, int, float, complex, type(None), tuple, type, Path, ModuleType)
_CONTAINERS = (list, dict, set)
_READING = ("get", "keys", "values", "items", "as_", "is_", "has_")  # how names of methods that only read begin


class View:
    """A view of an object that drops calls of its methods; what is written to it is seen through the view alone.

    Attributes, items and methods that only read, such as ``get_logdir``, are the object's own.

    Args:
        held: the object; None for what a dropped call returns.

    Example:
        >>> numbers = View({"lr": 0.1})
        >>> numbers["lr"] = 0.2
        >>> numbers.update(lr=0.3)  # doctest: +ELLIPSIS
        <...>
        >>> numbers["lr"], numbers.get("lr")
        (0.2, 0.1)
    """

    def __init__(self, held: Any) -> None:
        self.__dict__.update(_held=held, _written={})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(self._held)

    def __getattr__(self, name: str) -> Any:
        if name in ("_held", "_written"):  # a copy being built has no state yet
            raise AttributeError(name)
        return self._read((getattr, name), lambda: getattr(self._held, name) if self._held is not None else None)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        self._written[getattr, name] = value

    def __getitem__(self, key: Any) -> Any:
        return self._read(key, lambda: self._held[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._written[key] = value

    def __delitem__(self, key: Any) -> None:
        return

    def __iter__(self) -> Iterator[Any]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, key: Any) -> bool:
        return key in self._written or key in self._held

    def __call__(self, *args: Any, **kwargs: Any) -> View:
        """Return a view of nothing: the call is dropped."""
        return View(None)

    def __enter__(self) -> View:
        return self

    def __exit__(self, *args: object) -> None:
        return

    def _read(self, key: Any, read: Any) -> Any:
        if key not in self._written:
            value = read()
            if isinstance(value, _PLAIN) and self._held is not None:
                return value
            if callable(value) and getattr(value, "__name__", "").startswith(_READING):
                return value
            self._written[key] = copy.copy(value) if isinstance(value, _CONTAINERS) else View(value)
        return self._written[key]


class LoggerView:
    """A logger as user code sees it on trial: Lightning's own methods and experiments write nothing.

    Methods and attributes of a class of the user's are the logger's own, because a later step could read what they
    keep, which a trial has to show.

    Args:
        logger: of the Trainer.
    """

    def __init__(self, logger: Any) -> None:
        self.__dict__.update(_logger=logger, _views={})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        if name in ("_logger", "_views"):
            raise AttributeError(name)
        value = getattr(self._logger, name)
        if isinstance(value, _PLAIN) or _lightning.is_overridden(name, self._logger):
            return value
        return self._views.setdefault(name, View(value))

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._logger, name, value)


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` show their figures to nobody but user code that reads them back, and
    ``self.print`` print nothing.
    """

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, (int, float, Tensor)):
            figure = torch.as_tensor(value).detach()
            for store in _lightning.figures(module.trainer):
                assert isinstance(store, TrialFigures)
                store.log((name, f"{name}_step", f"{name}_epoch"), figure)

    def log_dict(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in () if isinstance(values, nn.Module) else values.items():  # metrics are no figures
            log(name, value)

    overrides = Overrides()
    overrides.set(module, "log", log)
    overrides.set(module, "log_dict", log_dict)
    overrides.set(module, "print", lambda *args, **kwargs: None)
    try:
        yield
    finally:
        overrides.undo()


@contextmanager
def silent_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """Replace the loggers of a Trainer by views within the context."""
    before = trainer.loggers
    views: list[Any] = [LoggerView(logger) for logger in before]
    trainer.loggers = views
    try:
        yield
    finally:
        trainer.loggers = before
