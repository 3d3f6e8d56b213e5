"""Parts of sharded tensors: what one process holds of a parameter, and gradients made of such parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is distributed, so that a process may hold a part of it alone (a ``DTensor``)."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, over the same memory: its own rows of a sharded one, else the tensor.

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


def own_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return the rows of a whole tensor that belong to what this process holds of a parameter of its shape.

    Args:
        whole: plain, of the parameter's shape.
        parameter: sharded along its first axis, or plain: then all rows are its own.
    """
    if not is_sharded(parameter):
        return whole
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    chunks = torch.chunk(whole, mesh.size(), dim=0)
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else whole[:0]


def as_gradient(part: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient of a parameter from the part of it that this process holds."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    held: Any = parameter
    return DTensor.from_local(
        part, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )


def whole_of(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, in the memory of the CPU; else the tensor. Every process must ask for it."""
    if not is_sharded(tensor):
        return tensor
    distributed: Any = tensor.detach()
    whole: Tensor = distributed.full_tensor().cpu()
    return whole
