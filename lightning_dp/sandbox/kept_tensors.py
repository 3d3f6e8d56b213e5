"""Tensors kept by value, compared bit by bit, and put back; many of them in a few calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import dense_parts_of, is_sparse
from lightning_dp.system.torch_private import num_changes

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types whose values show the bits of a floating-point type of as many bytes."""
_LARGE = 2**14
"""Elements above which a quick comparison looks at ``_RUNS`` runs of ``_RUN`` elements spread over a tensor."""
_RUNS, _RUN = 64, 16


class KeptTensor:
    """A tensor, its memory, and a copy of its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias = tensor, tensor.detach()
        self.is_leaf, self.requires_grad = tensor.is_leaf, tensor.requires_grad
        self.memory = _memory_of(self.alias)
        self.value = self.memory.clone()
        self.version = num_changes(tensor)
        self.is_large = self.value.numel() > _LARGE and self.memory.is_contiguous()

    def put_back(self, *, quick: bool, changed: bool | None = None) -> None:
        """Give the tensor its values, memory and shape; see ``Snapshot.put_back``.

        Args:
            quick: whether to compare few elements of a large tensor.
            changed: whether the memory holds other values, where this is known.
        """
        tensor, alias = self.tensor, self.alias
        if is_sparse(tensor) and tensor.layout is not torch.sparse_coo:  # of which ``data`` sets nothing
            tensor.detach().copy_(self.value)
            return
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            tensor.data = self.value.clone()
            return
        if self.is_leaf and not tensor.is_leaf:  # an operation in place has made it part of a graph
            tensor.detach_()
        now = tensor.detach()
        if _place_of(now) != _place_of(alias):
            tensor.data = alias
        elif quick and self.is_large and num_changes(tensor) == self.version and self._sample_is_same():
            return
        if changed is None:
            changed = not same_values(self.memory, self.value)
        if changed:
            self.memory.copy_(self.value)
        self.version = num_changes(tensor)
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)

    def few(self, memory: Tensor) -> Tensor:
        """Return the elements of its memory, or of a copy, that a quick comparison reads: runs within cache lines."""
        if not self.is_large:
            return memory.view(-1)
        return memory.as_strided((_RUNS, _RUN), (memory.numel() // _RUNS, 1), memory.storage_offset())

    def _sample_is_same(self) -> bool:
        return same_values(self.few(self.memory), self.few(self.value))


def find_changed(tensors: list[KeptTensor]) -> list[bool | None]:
    """Tell of each tensor whether its memory holds other values than it did, by one read for all on a device.

    A read of every comparison would wait for the device as often. None where nothing waits, and where tensors have no
    values to compare.
    """
    found: list[bool | None] = [None] * len(tensors)
    flags: dict[torch.device, dict[int, Tensor]] = {}
    for index, kept in enumerate(tensors):
        memory, value = kept.memory, kept.value
        if memory.layout == torch.strided and not memory.is_meta and not _is_near(memory):
            flags.setdefault(memory.device, {})[index] = (_bits_of(memory) != _bits_of(value)).any()
    for on_device in flags.values():
        for index, flag in zip(on_device, torch.stack([*on_device.values()]).tolist(), strict=True):
            found[index] = flag
    return found


class Together:
    """Kept tensors that are compared in a few calls, as a quick comparison of each would.

    Args:
        tensors: kept.
    """

    def __init__(self, tensors: list[KeptTensor]) -> None:
        self._kept, self._large = tensors, [kept for kept in tensors if kept.is_large]
        self._places: list[tuple[Any, ...]] = []
        self._comparable = all(
            kept.tensor.layout == torch.strided and kept.memory.is_contiguous() and kept.memory.device.type != "meta"
            for kept in tensors
        )
        if self._comparable:
            self._places = [(kept.tensor, *_place_of(kept.alias), kept.requires_grad) for kept in tensors]
        pieces: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for kept in tensors if self._comparable else ():
            memory, value = (_bits_of(kept.few(one)) for one in (kept.memory, kept.value))
            pieces.setdefault((memory.dtype, memory.device, memory.shape[1:]), []).append((memory, value))
        self._pieces = [
            ([now for now, _ in pairs], torch.cat([then for _, then in pairs])) for pairs in pieces.values()
        ]

    def are_unchanged(self) -> bool:
        """Tell whether all are as they were kept; False also where some have to be compared by themselves."""
        if not self._comparable or any(num_changes(kept.tensor) != kept.version for kept in self._large):
            return False
        return self._are_in_place() and all(torch.equal(torch.cat(now), then) for now, then in self._pieces)

    def renew(self) -> bool:
        """Keep the present values instead; return False if the form or memory of a tensor is another than it was."""
        if not (self._comparable and self._are_in_place()):
            return False
        for kept in self._kept:
            kept.value.copy_(kept.memory)
            kept.version = num_changes(kept.tensor)
        for now, then in self._pieces:
            torch.cat(now, out=then)
        return True

    def _are_in_place(self) -> bool:
        for tensor, address, dtype, shape, strides, requires_grad in self._places:
            if tensor.data_ptr() != address or tensor.dtype != dtype or tensor.requires_grad != requires_grad:
                return False
            if tensor.shape != shape or tensor.stride() != strides:
                return False
        return True


def _is_near(tensor: Tensor) -> bool:
    """Tell whether values of a tensor can be read without a wait."""
    return tensor.device.type == "cpu"


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _memory_of(tensor: Tensor) -> Tensor:
    """Return a writable tensor over the same memory: its flat memory if elements overlap, else the tensor."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)) if span < tensor.numel() else tensor


def same_values(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are equal bit by bit, NaN and the sign of zero included."""
    if left.shape != right.shape or left.dtype != right.dtype or left.layout != right.layout:
        return False
    if is_sparse(left):
        return all(map(same_values, dense_parts_of(left), dense_parts_of(right)))
    return torch.equal(_bits_of(left), _bits_of(right))


def _bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor of integers that are equal exactly if the bits of the values are."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_floating_point():
        return tensor.resolve_neg().view(_WHOLE_NUMBERS[tensor.element_size()])
    return tensor
