"""Per-sample gradients of any module by running it again, one sample at a time under ``vmap``.

    grad_i = vjp of theta -> module(theta; inputs of sample i), applied to the backprop of sample i

The smallest module that owns the parameters is recomputed; what it contains is constant. A module that draws random
numbers from torch's generators would be recomputed with others, so it is refused; global draws of Python and numpy are replayed.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import WAY_OUT, Axis, BatchAxis, CallLayout, Unclear, tensors_of
from lightning_dp.per_sample.recorder import Frame, Record, tap_all, version_of
from lightning_dp.per_sample.rules.base import widen
from lightning_dp.per_sample.units import Grads, Source

Gradient = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Grads]

_TENSOR = object()


class RecomputeUnit(Source):
    """A module whose parameters get their per-sample gradients from a second forward and backward of every sample.

    **Guarantee**: exact for modules whose output for a sample is a deterministic function of that sample's rows, and of draws
    from the global generators of Python and numpy. Draws of torch's generators raise ``PrivacyError``. Norm and weighted sum
    are taken from the same tensor, under either setting of ``memory``: a second recomputation could draw or round otherwise.
    """

    def __init__(self, *args: Any, paths: dict[str, list[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # qualified parameter name -> its names inside the module
        self.paths = paths

    @override
    def before(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        frame.note = [(tensor, version_of(tensor)) for tensor in tensors_of((args, kwargs))], _draws()
        return None

    @override
    def observe(self, frame: Frame, args: Any, kwargs: Any, output: Any) -> Any:
        inputs, draws = frame.note
        if any(version_of(tensor) != version for tensor, version in inputs):
            raise PrivacyError(
                f"Expected module {self.name!r} to leave its inputs as they are, got one modified in place during its "
                f"call. {WAY_OUT}."
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        record = Record(self, frame, tensors, len(tensors_of(output)))
        record.args = ([_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec, draws)
        return tap_all(output, record)

    @override
    def per_sample(self, names: set[str]) -> Grads:
        recorder = self.recorder
        grads: Grads = {}
        active, recorder.active = recorder.active, False
        try:
            for record in self.records:
                for backprops, left in record.parts:
                    wanted = names & left
                    if not wanted:
                        continue
                    with _replayed(record.args[2]):
                        found = self._recompute(record, backprops, wanted)
                    for name, grad in found.items():
                        grads[name] = grads[name] + grad if name in grads else grad
        finally:
            recorder.active = active
        return grads

    def _recompute(self, record: Record, backprops: list[Tensor | None], names: set[str]) -> Grads:
        size, where = self.recorder.batch_size, f"module {self.name!r}"
        layout = self.layout_of(record, backprops)
        inputs = [_per_sample_rows(t, layout.inputs[i], size, where) for i, t in enumerate(record.inputs)]
        outputs = [i for i, backprop in enumerate(backprops) if backprop is not None]
        cotangents = tuple(self._cotangent(layout, i, backprops[i], size, where) for i in outputs)
        mapped = tuple(rows for rows, axis in zip(inputs, layout.inputs, strict=True) if axis is not None)
        named = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        constants: Grads = {path: widen(t.detach()) if t.is_floating_point() else t.detach() for path, t in named}
        theta = {name: constants[self.paths[name][0]] for name in sorted(names)}

        def values(theta: Grads) -> Grads:
            return {**constants, **{path: theta[name] for name in theta for path in self.paths[name]}}

        def call(rows: tuple[Tensor, ...], run: Callable[[Any, Any], Any]) -> tuple[Tensor, ...]:
            given = iter(rows)
            tensors = [
                next(given).movedim(0, axis.axis) if isinstance(axis, BatchAxis) else tensor
                for tensor, axis in zip(inputs, layout.inputs, strict=True)
            ]
            output = tensors_of(run(*_rebuild(record.args, tensors)))
            picked = []
            for i in outputs:
                axis = layout.outputs[i]
                assert isinstance(axis, BatchAxis)
                picked.append(widen(output[i].movedim(axis.axis, 0)))
            return tuple(picked)

        def mapped_gradient(rows: tuple[Tensor, ...], cotangent: tuple[Tensor, ...]) -> Grads:
            def forward(theta: Grads) -> tuple[Tensor, ...]:
                run = partial(functional_call, self.module, values(theta), tie_weights=False)
                return call(rows, lambda args, kwargs: run(args=args, kwargs=kwargs))

            found: Grads = vjp(forward, theta)[1](cotangent)[0]
            return found

        def plain_gradient(rows: tuple[Tensor, ...], cotangent: tuple[Tensor, ...]) -> Grads:
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
            # the backward may run parts of the forward again (checkpointing): it too happens inside
            with torch.enable_grad(), _in_place_of(self.module, values(leaves)), _replayed(record.args[2]):
                pairs = zip(call(rows, lambda args, kwargs: self.module(*args, **kwargs)), cotangent, strict=True)
                used = [(output, weight) for output, weight in pairs if output.requires_grad]
                if used:
                    torch.autograd.backward([output for output, _ in used], [weight for _, weight in used])
            return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}

        if size == 0:
            return {name: tensor.new_zeros(0, *tensor.shape) for name, tensor in theta.items()}
        return self._map(mapped_gradient, plain_gradient, mapped, cotangents, size)

    @staticmethod
    def _cotangent(layout: CallLayout, leaf: int, backprop: Tensor | None, size: int, where: str) -> Tensor:
        assert backprop is not None
        axis = layout.outputs[leaf]
        if not isinstance(axis, BatchAxis):
            raise PrivacyError(
                f"Expected a batch axis in every output of {where} that the loss uses, got none in output {leaf}. "
                f"{WAY_OUT}."
            )
        return _per_sample_rows(backprop, axis, size, where)

    def _map(
        self, gradient: Gradient, plain: Gradient, rows: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], size: int
    ) -> Grads:
        """Map over the samples: by ``vmap``, and where that cannot run the module by a loop of plain backwards."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vmap's notes on operations it maps slowly
                mapped: Grads = vmap(gradient, randomness="error")(rows, cotangents)
            return mapped
        except Exception as error:
            reason = error
        before = _random_states(cotangents[0].device)
        try:
            singles = [plain(tuple(t[i] for t in rows), tuple(t[i] for t in cotangents)) for i in range(size)]
        except Exception:
            raise PrivacyError(
                f"Expected module {self.name!r} to run on one sample at a time, since its parameters "
                f"{sorted(self.names)} need it; it raised {reason!r}. Move the parameter into a module of its own, or "
                "use microbatch_size=1."
            ) from reason
        if any(not torch.equal(a, b) for a, b in zip(before, _random_states(cotangents[0].device), strict=True)):
            raise PrivacyError(
                f"Expected module {self.name!r} to draw no random numbers, since its parameters {sorted(self.names)} "
                "need it to be run again. Move the parameter into a module of its own, or use microbatch_size=1."
            )
        return {path: torch.stack([single[path] for single in singles]) for path in singles[0]}


def _per_sample_rows(tensor: Tensor, axis: Axis, size: int, where: str) -> Tensor:
    """Return ``(B, K, ...)``; a tensor without batch axis as it is. Floating tensors in their accumulation type."""
    if tensor.is_floating_point():
        tensor = widen(tensor)
    if isinstance(axis, Unclear):
        raise PrivacyError(f"Expected a readable batch axis in {where}, but {axis.reason}. {WAY_OUT}.")
    if axis is None:
        return tensor
    front: Tensor
    front, rows = axis.to_front(tensor, size, where)
    return front.reshape(size, rows, *front.shape[1:])


def _rebuild(stored: tuple[Any, ...], tensors: list[Tensor]) -> Any:
    leaves, spec, _ = stored
    given = iter(tensors)
    full = [next(given) if leaf is _TENSOR else leaf for leaf in leaves]
    return pytree.tree_unflatten(full, spec)


@contextmanager
def _in_place_of(module: nn.Module, tensors: Grads) -> Iterator[None]:
    """Put tensors in place of the parameters and buffers of a module, by their paths."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, tensor in tensors.items():
            owner, _, local = path.rpartition(".")
            inner = module.get_submodule(owner)
            places: dict[str, Any] = inner._parameters if local in inner._parameters else inner._buffers
            held.append((places, local, places[local]))
            places[local] = tensor
        yield
    finally:
        for places, local, tensor in reversed(held):
            places[local] = tensor


def _draws() -> tuple[Any, Any]:
    """Return the states of the global generators of Python and numpy."""
    return random.getstate(), np.random.get_state()  # noqa: NPY002


@contextmanager
def _replayed(draws: tuple[Any, Any]) -> Iterator[None]:
    """Draw what was drawn from these states on; put the generators back afterwards."""
    now = _draws()
    try:
        random.setstate(draws[0])
        np.random.set_state(draws[1])  # noqa: NPY002
        yield
    finally:
        random.setstate(now[0])
        np.random.set_state(now[1])  # noqa: NPY002


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states
