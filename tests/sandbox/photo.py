"""A picture of any state, made without the code under test: values bit by bit, and which objects hold them."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = frozenset(nn.Module().__dict__) - {
    "training",
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
}


def photo(value: Any, seen: dict[int, str] | None = None, path: str = "root") -> Any:
    """Return a nested tuple that is equal before and after exactly if nothing has changed."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type)):
        return repr(value)
    if id(value) in seen:
        return "same as", seen[id(value)]
    seen[id(value)] = path
    head = type(value).__name__, id(value)
    if isinstance(value, Tensor):
        return *head, *tensor_bits(value)
    if isinstance(value, np.ndarray):
        return *head, value.shape, value.dtype.str, value.tobytes(), value.flags.writeable
    if isinstance(value, torch.Generator):
        return *head, value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return *head, repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return *head, repr(value.get_state())
    if isinstance(value, random.Random):
        return *head, None if isinstance(value, random.SystemRandom) else value.getstate()
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += [(photo(k, seen, path), photo(v, seen, f"{path}[{k!r}]")) for k, v in value.items()]
    elif isinstance(value, (set, frozenset)):
        parts += sorted(map(repr, value))
    elif isinstance(value, (list, tuple, deque)) or hasattr(value, "extend"):
        parts += [photo(item, seen, f"{path}[{number}]") for number, item in enumerate(value)]
    attributes = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        attributes = {name: held for name, held in attributes.items() if name not in HOOKS}
    for name in slots(type(value)):
        if hasattr(value, name):
            attributes[name] = getattr(value, name)
    parts += [(name, photo(attributes[name], seen, f"{path}.{name}")) for name in sorted(attributes)]
    return *head, tuple(parts)


def slots(kind: type) -> list[str]:
    """Return the attribute names of all slots of a class, private ones as Python mangles them."""
    names = []
    for each in kind.__mro__:
        own = vars(each).get("__slots__", ())
        for name in [own] if isinstance(own, str) else own:
            hidden = name.startswith("__") and not name.endswith("__")
            names.append(f"_{each.__name__.lstrip('_')}{name}" if hidden else name)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def tensor_bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return place, layout and bytes of a tensor."""
    facts = tensor.dtype, tuple(tensor.shape), tensor.requires_grad, tensor.is_leaf
    if tensor.layout != torch.strided:
        return *facts, tensor.detach().to_dense().numpy().tobytes()
    flat = tensor.detach().contiguous().reshape(-1)
    place = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()
    return *facts, *place, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""
