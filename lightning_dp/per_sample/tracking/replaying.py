"""Per-sample gradients of a ``torch.autograd.Function`` that takes private parameters together with samples.

Such a class runs on the whole batch in the forward. After the backward it runs again for one sample after the other,
and its own ``backward`` gives the gradients of that sample. This costs less than to run the whole step that often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness
from lightning_dp.per_sample.layout import BatchAxis
from lightning_dp.per_sample.rules.base import Call, widen
from lightning_dp.per_sample.tracking.registered import Registered, Shapes, report_apply, run_registered
from lightning_dp.per_sample.tracking.untracked import hidden_use, of_class

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.nodes import Node
    from lightning_dp.per_sample.tracking.tracker import Tracker

_NAMES = tuple(map(str, range(64)))
"""Names of positional arguments."""
_TOLERANCE = 1e-3
"""Largest difference between the result of a sample alone and in the batch, relative to the largest entry."""


class Replayed(Registered):
    """The rule of a ``torch.autograd.Function`` that is run again for each sample.

    **Guarantee**: the gradient of a sample is computed from its own rows and backprops alone. The result of each sample
    alone is compared with that of the batch, once; a difference is refused, so samples then run one at a time.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function.__name__, _no_gradients, _NAMES, _NAMES)
        self._function, self._apply = function, function.apply

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let ``apply`` of the class report arguments that are tracked, within the context."""

        def run(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
            return run_registered(tracker, func, args, kwargs, self, self.named(args), self.parameters)

        undo = report_apply(self._function, run)
        try:
            yield
        finally:
            undo()

    @override
    def check(
        self, tracker: Tracker, nodes: Mapping[str, Node], values: Mapping[str, Any], axes: Mapping[str, Any], out: Any
    ) -> None:
        if not self._holds(tracker, values, axes, out):
            names = dict.fromkeys(name for node in nodes.values() for name in node.names)
            raise hidden_use([*names], of_class([self._function]))

    def _holds(self, tracker: Tracker, values: Mapping[str, Any], axes: Mapping[str, Any], out: Any) -> bool:
        if not isinstance(out, Tensor) or not all(isinstance(axis, BatchAxis) for axis in axes.values()):
            return False
        if any(out is value for value in values.values()) or torch.is_autocast_enabled(out.device.type):
            return False
        at = {name: axis.axis for name, axis in axes.items()}
        key, size = (self._function, *at.items()), tracker.recorder.batch_size
        if key in tracker.tried or size == 0:
            return True
        given = {**values, "": out.detach()}
        rows = {name: axis.to_front(given[name], size, self.name)[0] for name, axis in axes.items()}
        with torch.no_grad(), FrozenRandomness() as draws:
            for mine in _of_samples(rows, at, size):
                part = mine.pop("")
                if not _alike(self._apply(*_fresh({**values, **mine}).values()), part):
                    return False
        if draws.has_draws:  # a sample alone would see others than in the batch
            return False
        tracker.tried.add(key)
        return True

    @override
    def per_sample(self, module: Any, calls: Sequence[Call], batch_size: int, names: set[str]) -> dict[str, Tensor]:
        spec: Shapes = module
        like = calls[0].backprop
        grads = {name: widen(like.new_zeros(batch_size, *spec[name])) for name in names}
        order = sorted(names)
        for call in calls:
            rows = {name: call.kwargs[name] for name in spec.axes if name} | {"": call.backprop}
            for sample, mine in enumerate(_of_samples(rows, spec.axes, batch_size)):
                backprop = mine.pop("")
                with torch.enable_grad(), unfollowed():
                    values = _fresh({**call.kwargs, **mine})
                    leaves = [values[name].requires_grad_() for name in order]
                    found = torch.autograd.grad(self._apply(*values.values()), leaves, backprop, allow_unused=True)
                for name, grad in zip(order, found, strict=True):
                    if grad is not None:
                        grads[name][sample] += grad
        return grads


class Replays:
    """The classes that take private parameters together with samples."""

    def __init__(self) -> None:
        self.hidden: dict[str, Any] = {}
        """Parameters that such a class took, and the class."""
        self._rules: dict[Any, Replayed] = {}

    def add_hidden(self) -> bool:
        """Run the classes that were found again for each sample from here on; tell whether some are new."""
        new = {*self.hidden.values()} - self._rules.keys()
        self._rules.update((one, Replayed(one)) for one in new)
        return bool(new)

    @property
    def rules(self) -> list[Replayed]:
        """Rules that run these classes again for each sample."""
        return [*self._rules.values()]


def _no_gradients(values: Mapping[str, Any], backprop: Tensor) -> Mapping[str, Tensor]:
    raise AssertionError("A class that is run again has no function of its gradients.")


def _fresh(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with tensors of their own, which the class may write to."""
    return {name: one.detach().clone() if isinstance(one, Tensor) else one for name, one in values.items()}


def _of_samples(rows: Mapping[str, Tensor], axes: Mapping[str, Any], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of each sample, along the axes on which an operation has them.

    Args:
        rows: those of a sample next to each other, along the first axis.
        axes: of the operation, by name.
        size: number of samples.
    """
    parts = {name: one.reshape(size, len(one) // size, *one.shape[1:]) for name, one in rows.items()}
    for sample in range(size):
        yield {name: part[sample].movedim(0, axes[name]) for name, part in parts.items()}


def _alike(alone: Any, part: Tensor) -> bool:
    """Tell whether a result of one sample alone is that of the batch."""
    if not isinstance(alone, Tensor) or alone.shape != part.shape:
        return False
    largest = float(part.abs().nan_to_num().max()) if part.numel() else 0.0
    return torch.allclose(alone, part, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)
