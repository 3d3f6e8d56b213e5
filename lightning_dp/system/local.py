"""Local parts of sharded tensors: the rows of a parameter on one process, and gradients made of such parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dp.per_sample._torch import dense_parts_of


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is distributed (a ``DTensor``), so that a process may hold only a part of it."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, over the same memory: its rows if sharded, else the whole tensor.

    Example:
        >>> plain = torch.zeros(3)
        >>> local_part(plain) is plain
        True
    """
    if not is_sharded(tensor):
        return tensor
    distributed: Any = tensor.detach()
    part: Tensor = distributed.to_local()
    return part


def address_of(tensor: Tensor) -> int:
    """Return the address of the first entry of a tensor on this process; of a sparse tensor, that of its values."""
    return dense_parts_of(local_part(tensor))[-1].data_ptr()


def addresses_of(tensors: list[Tensor]) -> tuple[int, ...]:
    """Return the address of each tensor; 0 for sharded ones."""
    try:
        return tuple([tensor.data_ptr() for tensor in tensors])
    except RuntimeError:  # sparse tensors have several, and sharded ones none
        return tuple([0 if is_sharded(tensor) else address_of(tensor) for tensor in tensors])


def own_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the rows of a whole tensor that match this process's part of a parameter with the same shape.

    Args:
        whole: tensor that is not sharded, of the parameter's shape.
        parameter: sharded along its first axis; if it is not sharded, all rows are returned.
    """
    if not is_sharded(parameter):
        return whole
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    chunks = torch.chunk(whole, mesh.size(), dim=0)
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else whole[:0]


def as_gradient(part: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a gradient in the form of the parameter: a ``DTensor`` if it is sharded."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    held: Any = parameter
    return DTensor.from_local(
        part, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )


def whole_of(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on the CPU; return any other tensor unchanged. Every process must call it."""
    if not is_sharded(tensor):
        return tensor
    distributed: Any = tensor.detach()
    whole: Tensor = distributed.full_tensor().cpu()
    return whole
