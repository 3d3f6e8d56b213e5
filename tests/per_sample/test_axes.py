"""Axes of owners after an operation: a row of the result must come from the same row of the tensor alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.per_sample.owners.axes import AXES
from tests.cases import each

X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))

# operation, its other arguments, and the axis of the result for each axis of the tensor
Case = tuple[Callable[..., Any], tuple[Any, ...], list[int | None]]
CASES: dict[str, Case] = {
    "sum": (torch.sum, (1,), [0, None, 1, 2]),
    "sum of all": (torch.sum, (), [None] * 4),
    "mean, axes kept": (torch.mean, ((-1, 1), True), [0, None, 2, None]),
    "softmax": (torch.softmax, (2,), [0, 1, None, 3]),
    "norm": (torch.norm, (2, -1), [0, 1, 2, None]),
    "argsort": (torch.argsort, (), [0, 1, 2, None]),
    "linear": (F.linear, (torch.randn(2, 6),), [0, 1, 2, None]),
    "layer_norm": (F.layer_norm, ((5, 6),), [0, 1, None, None]),
    "pad": (F.pad, ((1, 1, 0, 2),), [0, 1, None, None]),
    "group_norm": (F.group_norm, (2,), [0, None, None, None]),
    "batch_norm": (F.batch_norm, (torch.zeros(4), torch.ones(4), None, None, True), [None] * 4),
    "cdist": (torch.cdist, (torch.randn(3, 4, 7, 6),), [0, 1, 2, None]),
    "view_as_complex": (lambda x: torch.view_as_complex(x[..., :2].contiguous()), (), [0, 1, 2, None]),
    "view": (Tensor.view, (3, 20, 6), [0, None, None, None]),
    "view as other numbers": (Tensor.view, (torch.int32,), [None] * 4),
    "expand": (Tensor.expand, (2, 3, 4, 5, 6), [1, 2, 3, 4]),
    "repeat": (Tensor.repeat, (2, 1, 3, 1, 1), [1, None, 3, 4]),
    "tile": (torch.tile, ((1, 2),), [0, 1, 2, None]),
    "transpose": (torch.transpose, (-1, 1), [0, 3, 2, 1]),
    "unsqueeze": (torch.unsqueeze, (-2,), [0, 1, 2, 4]),
    "permute": (Tensor.permute, (2, 0, -1, 1), [1, 3, 0, 2]),
    "getitem": (Tensor.__getitem__, ((slice(None), 1, None, slice(1, 3)),), [0, None, None, 3]),
    "getitem from the end": (Tensor.__getitem__, ((Ellipsis, None, slice(None), 0),), [0, 1, 3, None]),
    "getitem by tensors": (
        Tensor.__getitem__,
        ((torch.tensor([1, 0]), slice(None), torch.tensor([0, 1])),),
        [None] * 4,
    ),
    "getitem by a vector": (Tensor.__getitem__, ((Ellipsis, torch.tensor([1, 0, 1]), slice(None)),), [0, 1, None, 3]),
    "getitem by a mask": (Tensor.__getitem__, ((slice(None), torch.tensor([True, False] * 2)),), [0, None, 2, 3]),
    "getitem by a matrix": (Tensor.__getitem__, ((slice(None), torch.tensor([[0, 1]])),), [None] * 4),
    "getitem by number and vector": (Tensor.__getitem__, ((0, slice(None), torch.tensor([1])),), [None] * 4),
    "flip": (torch.flip, ((1, -1),), [0, None, 2, None]),
    "flip of axes": (Tensor.flip, (1, 2), [0, None, None, 3]),
    "roll": (torch.roll, (2, -1), [0, 1, 2, None]),
    "roll of all": (torch.roll, (2,), [None] * 4),
    "cat": (lambda x, axis: torch.cat([x, x + 1], axis), (-2,), [0, 1, None, 3]),
    "stack": (lambda x, axis: torch.stack([x, x + 1], axis), (-3,), [0, 1, 3, 4]),
}


@each("name", list(CASES))
def test_a_row_after_an_operation_comes_from_that_row_alone(name: str) -> None:
    operation, args, expected = CASES[name]
    known = {"getitem": "__getitem__", "mean,": "mean"}
    after = AXES[known.get(name.split(" ")[0], name.split(" ")[0])]
    out = operation(X, *args)
    given = ([X, X], *args) if name in ("cat", "stack") else (X, *args)
    options = {"training": True} if name == "batch_norm" else {}
    found = [after(X, axis, given, options, out) for axis in range(X.dim())]
    assert found == expected
    for axis, at in enumerate(found):
        if at is None:
            continue
        assert out.shape[at] == X.shape[axis]
        for row in range(X.shape[axis]):
            other = X.clone()
            other.select(axis, row).add_(torch.rand(other.select(axis, row).shape))
            changed = (operation(other, *args) != out).movedim(at, 0)
            assert not changed[torch.arange(len(changed)) != row].any()
