"""The base class of rules, which compute per-sample gradients from activations and backprops.

Shape legend: ``B`` samples of a microbatch, ``K`` rows of one sample, ``R = B * K`` rows (sample-major).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.masks.parameter_mask import ParameterMask

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Elements of a temporary that stays in a processor's cache; other devices are better off with few large ones."""

LONGEST_SUM = 4096
"""Squares that are added up one by one in the norms' type."""


@dataclass
class Call:
    """One use of an operation in a microbatch: batch axis first, the rows of a sample next to each other.

    Args:
        inputs: positional arguments; built-in rules do not read them.
        kwargs: arguments of an operation with a registered rule, by name, rows first; else empty.
        activation: main input, shape ``(B * K, ...)``, detached; the backprop if there is no main input.
        backprop: gradient of the loss with respect to the output, shape ``(B * K, ...)``, same row order.
        multiplicity: ``K >= 1``: rows of one sample, which are next to each other. More than one when time steps or
            augmented views were folded into the batch axis.

    Example:
        >>> call = Call(inputs=(), kwargs={}, activation=torch.ones(4, 3), backprop=torch.ones(4, 2), multiplicity=2)
        >>> sum_rows(call.backprop, call.multiplicity).shape
        torch.Size([2, 2])
    """

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    activation: Tensor
    backprop: Tensor
    multiplicity: int = field(default=1)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of norms and sums: float64 for float64 and complex128 tensors, float32 for all others."""
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in its accumulation dtype; no copy if the tensor has that dtype already."""
    return tensor.to(accumulation_dtype(tensor))


def sum_rows(tensor: Tensor, multiplicity: int) -> Tensor:
    """Add the ``K`` rows of each sample: ``(B * K, ...) -> (B, ...)``; no copy for ``K = 1``."""
    if multiplicity == 1:
        return tensor
    return tensor.reshape(tensor.shape[0] // multiplicity, multiplicity, *tensor.shape[1:]).sum(1)


def samples_a_block(size: int, elements: int, device: torch.device) -> int:
    """Return the number of samples to process at once, at least one, given the number of elements per sample."""
    return max(1, min(size, BLOCK_ELEMENTS.get(device.type, 2**25) // max(1, elements)))


def squared_norm(grads: Tensor) -> Tensor:
    """Return the squared norm of every sample: ``(B, ...) -> (B,)``; not finite if the sample's row is not."""
    if not grads.shape[0]:
        return grads.new_zeros(0)
    flat = (grads if grads.dim() == 2 else grads.reshape(grads.shape[0], -1)).contiguous()
    if flat.shape[1] <= LONGEST_SUM:
        return _norms(flat).square()
    return norms_of_blocks(flat, len(flat)).to(_widest(flat)).square().sum(1).to(flat.dtype)


def norms_of_blocks(tensor: Tensor, num_rows: int) -> Tensor:
    """Return the norms of blocks of every row of a tensor, shape ``(B, blocks)``.

    A long row is added up in blocks, because equal squares that are added one by one in float32 may all round in the
    same direction (for a row of 16 million equal numbers, by 0.7 % of its squared norm).

    Args:
        tensor: one row per sample, of any shape.
        num_rows: ``B``, at least 1.
    """
    block = _block_of(tensor.numel() // num_rows)
    if block:
        return _norms(tensor.reshape(num_rows, -1, block))
    parts = torch.split(tensor.reshape(num_rows, -1), LONGEST_SUM, 1)
    return torch.stack([_norms(part) for part in parts], 1)


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms


def _widest(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # mps has no float64


@lru_cache
def _block_of(size: int) -> int:
    """Return the largest block length that divides a row evenly; 0 if the blocks would be short."""
    return next((block for block in range(LONGEST_SUM, LONGEST_SUM // 8, -1) if size % block == 0), 0)


def masked_squared_norm(grads: Tensor, mask: Tensor) -> Tensor:
    """Return the squared norm of ``mask * grads[i]`` for every i, computed in blocks of coordinates in one small
    buffer.

    An inactive coordinate counts only if it is not finite: then the norm is not finite either.
    """
    size = grads.shape[0]
    flat, weights = (
        grads.reshape(size, -1) if size else grads.new_zeros(0, mask.numel()),
        mask.to(grads.dtype).flatten(),
    )
    step = samples_a_block(len(weights), max(1, size), grads.device)
    norms, product = grads.new_zeros(size, dtype=_widest(grads)), grads.new_empty(size * step)
    for low in range(0, len(weights), step):
        part = flat[:, low : low + step]
        norms += squared_norm(torch.mul(part, weights[low : low + step], out=product[: part.numel()].view_as(part)))
    return norms.to(grads.dtype)


def is_cheap_to_read(tensor: Tensor) -> bool:
    """Tell whether a value of a tensor can be read without a wait for its device."""
    return tensor.device.type == "cpu"


def weighted_rows(grads: Tensor, factors: Tensor) -> Tensor:
    """Return ``sum_i factors[i] * grads[i]``: ``(B, ...), (B,) -> (...)``; a factor of 0 drops even a NaN row."""
    kept = factors != 0
    if not is_cheap_to_read(grads) or not bool(kept.all()):
        grads = torch.where(kept.reshape(-1, *[1] * (grads.dim() - 1)), grads, grads.new_zeros(()))
    total: Tensor = torch.tensordot(factors.to(grads.dtype), grads, dims=1)
    return total


class Rule(ABC):
    """Per-sample gradients of the parameters of one layer family.

    A rule is stateless; one instance serves every layer of its family. It runs without autograd and without autocast.
    All calls of one module in a microbatch are ONE use of its parameters: their gradients are added before any norm.

    **Guarantee**: the three methods describe the same gradients: ``squared_norms`` returns the squared norms of the
    rows of ``per_sample``, and ``add_weighted_sum`` adds these rows with the given factors, in float32 accumulation
    (float64 for float64 tensors). The result for a sample depends on that sample's rows only. A sample's contribution
    to the weighted sum is at most its factor times its reported norm, to 1e-5, even if its terms cancel: either both
    methods use the same ``per_sample``, or the norms include the rounding between the two ways (``rounding.py``).
    """

    fills_buffers = False
    """True if :meth:`fill` writes directly into its output: large gradients are then cached in one reused buffer."""

    is_stackable = True
    """True if equal layers can be computed as one layer of all their samples."""

    is_linear = False
    """True if the operation is linear in its input, up to a bias."""

    parameters: tuple[str, ...] = ("weight", "bias")
    """Local names of the parameters the rule knows."""

    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        """Tell whether samples may run along this axis of an input with that many axes."""
        return axis == 0

    @abstractmethod
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        """Return the gradient of every sample for the named parameters.

        Args:
            module: settings of the layer (the spec of the operation); its parameters need not hold values.
            calls: at least one call.
            batch_size: ``B``, 0 allowed.
            names: local parameter names to return, such as ``{"weight", "bias"}``.

        Returns:
            Local name to tensor of shape ``(B, *parameter.shape)`` in the accumulation type. Not private.
        """

    def squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        """Return every sample's squared gradient norm, one tensor of shape ``(B,)`` per name. Not private."""
        return {name: squared_norm(grads) for name, grads in self.per_sample(module, calls, batch_size, names).items()}

    def masked_squared_norms(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, masks: Mapping[str, ParameterMask]
    ) -> dict[str, Tensor]:
        """Return the squared norm of ``mask * gradient_i`` for every name in ``masks``, shape ``(B,)``.

        Args:
            module: the layer.
            calls: at least one call.
            batch_size: ``B``, 0 allowed.
            masks: local name to the parameter's mask; public.

        Returns:
            Local name to squared norms. A gradient that is not finite under the mask makes its norm not finite.
        """
        grads = self.per_sample(module, calls, batch_size, set(masks))
        return {name: masked_squared_norm(grad, masks[name].active) for name, grad in grads.items()}

    def add_weighted_sum(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
    ) -> None:
        """Add ``sum_i factors[i] * gradient_i`` to ``out[name]`` for every name in ``out``.

        Args:
            module: the layer.
            calls: at least one call. The engine has set the rows of every sample with factor 0 to zero, because they
                could be non-finite.
            factors: shape ``(B,)``, finite.
            batch_size: ``B``, 0 allowed.
            out: local name to a tensor of the parameter's shape. Not private until noise is added.
        """
        for name, grads in self.per_sample(module, calls, batch_size, set(out)).items():
            out[name].add_(weighted_rows(grads, factors))

    def prefers_active_entries(self, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        """Tell whether :meth:`active_entries` is the fastest way for a mask with few active entries.

        It is the fastest way if norms under a mask need the per-sample gradients anyway. Norms and weighted sum then
        come from the active entries alone.
        """
        return False

    def active_entries(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, mask: ParameterMask
    ) -> Tensor:
        """Return the active entries of every sample's gradient.

        Args:
            module: the layer.
            calls: at least one call.
            batch_size: ``B``, 0 allowed.
            name: local parameter name.
            mask: of the parameter; public.

        Returns:
            Shape ``(B, L)`` in the accumulation type. Not private.
        """
        return mask.select_rows(self.per_sample(module, calls, batch_size, {name})[name])

    def add_active_entries(
        self,
        module: nn.Module,
        calls: Sequence[Call],
        factors: Tensor,
        batch_size: int,
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask],
    ) -> set[str]:
        """Add the active entries of the weighted sum, if that is cheaper; return the names of the parameters done.

        Args:
            module: the layer.
            calls: at least one call.
            factors: shape ``(B,)``, finite.
            batch_size: ``B``, 0 allowed.
            out: local name to a 1-D tensor of the active entries.
            masks: local name to the parameter's mask; public.
        """
        return set()

    def fill(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str, out: Tensor) -> None:
        """Write the gradient of every sample into ``out``, shape ``(B, *parameter.shape)``, over the old values."""
        out.copy_(self.per_sample(module, calls, batch_size, {name})[name])

    def materialises(self, module: nn.Module, calls: Sequence[Call], batch_size: int, name: str) -> bool:
        """Tell whether materializing per-sample gradients is the fastest way to their norms and weighted sum.

        The engine then caches them between norms and weighted sum if memory allows. Gradients that take no more memory
        than the backprops are always cached.
        """
        return type(self).squared_norms is Rule.squared_norms
