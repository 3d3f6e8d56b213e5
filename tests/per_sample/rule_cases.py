"""One table of layers for contracts over rules: every registered rule is in it, and so are the ways without one.

Legend: ``B`` samples, ``T`` uses of the parameters by one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """As in transformers: a linear layer with the weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Bare(nn.Module):
    """Parameters without a rule, used by a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class Recurrent(nn.Module):
    """The next state of a zero one."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.flatten(0, -2), None).unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Case:
    """A layer and one of its inputs.

    Args:
        make: returns the layer.
        element: shape of one input without the batch axis.
        uses: ``T``.
        joined: whether uses become positions of one call along the last axis (True) or along the second one (False).
    """

    make: Callable[[], nn.Module]
    element: tuple[int, ...]
    uses: int = 6
    joined: bool = False


#: Between them the linear and convolutional cases take every route to a norm and to a sum.
CASES: dict[str, Case] = {
    "linear, Gram matrices": Case(lambda: nn.Linear(40, 30), (40,)),
    "linear, products": Case(lambda: nn.Linear(12, 10), (12,), 9),
    "linear, cached": Case(lambda: nn.Linear(40, 30), (40,), 24),
    "linear, small": Case(lambda: nn.Linear(3, 10), (3,)),
    "transposed linear": Case(lambda: Conv1D(10, 12), (12,), 9),
    "embedding": Case(lambda: nn.Embedding(11, 4), ()),
    "embedding, padding": Case(lambda: nn.Embedding(11, 4, padding_idx=0), ()),
    "conv1d, unfolded": Case(lambda: nn.Conv1d(3, 7, 3, 3), (3, 3), joined=True),
    "conv2d, Gram matrices": Case(lambda: nn.Conv2d(6, 20, (3, 2), (3, 2)), (6, 3, 2), joined=True),
    "conv2d, grouped": Case(lambda: nn.Conv2d(12, 6, (3, 2), (3, 2), groups=2), (12, 3, 2), 12, joined=True),
    "conv2d, one by one": Case(lambda: nn.Conv2d(12, 4, (1, 1)), (12, 1, 1), 9, joined=True),
    "conv2d, dilated": Case(
        lambda: nn.Conv2d(12, 4, (2, 2), (3, 3), dilation=2, padding_mode="circular"), (12, 3, 3), 12, joined=True
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 5, 2, 2), (2, 2, 2, 2), joined=True),
    "layer norm": Case(lambda: nn.LayerNorm(5), (5,)),
    "rms norm": Case(lambda: nn.RMSNorm(5), (5,)),
    "group norm": Case(lambda: nn.GroupNorm(2, 4), (4, 3), joined=True),
    "instance norm": Case(lambda: nn.InstanceNorm1d(4, affine=True), (4, 3), joined=True),
    "elementwise": Case(lambda: Bare(lambda x, w: x * w, 5), (5,)),
    "repeated for every sample": Case(lambda: Bare(lambda x, w: x + w.expand(x.shape), 5), (5,)),
    "mapped over the samples": Case(lambda: Bare(lambda x, w: torch.einsum("...i,ij->...j", x, w), 5, 3), (5,)),
    "tensordot": Case(lambda: Bare(lambda x, w: torch.tensordot(x, w, ((-1, -2), (1, 0))), 3, 4, 2), (3, 4)),
    "tensordot, weight first": Case(
        lambda: Bare(lambda x, w: torch.tensordot(w, x, ([1], [-1])).movedim(0, -1), 3, 5), (5,)
    ),
    "slices of a weight": Case(lambda: Bare(lambda x, w: x @ w[:, :3] + x @ w[:, 2:5], 12, 5), (12,)),
    "disjoint slices": Case(lambda: Bare(lambda x, w: x @ w[:, :3] + x @ w[:, 3:], 12, 6), (12,)),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 10)), (12,), 9),
    "low-rank product": Case(lambda: Bare(lambda x, w: x @ (w @ w.T), 5, 2), (5,)),
    "recurrent": Case(lambda: Recurrent(nn.GRUCell(5, 4)), (5,)),
}

HOWS = ("positions", "calls", "rows", "units")


class Arranged(nn.Module):
    """Use a layer ``T`` times for each sample: ``(B, T, *element) -> (B, T, *output)``.

    Args:
        case: the layer.
        how: "positions" of one call, several "calls", "rows" folded into the batch axis, or several "units": layers
            that share their parameters.
    """

    def __init__(self, case: Case, how: str) -> None:
        super().__init__()
        self.case, self.how = case, how
        self.layers = nn.ModuleList([case.make() for _ in range(case.uses if how == "units" else 1)])
        for layer in self.layers[1:]:
            for name, parameter in self.layers[0].named_parameters():
                owner, _, local = name.rpartition(".")
                setattr(layer.get_submodule(owner), local, parameter)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layers[0]
        if self.how == "rows":
            return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.how != "positions":
            layers = self.layers if self.how == "units" else [layer] * x.shape[1]
            return torch.stack([one(part) for one, part in zip(layers, x.unbind(1), strict=True)], 1)
        if not self.case.joined:
            return layer(x)
        output = layer(torch.cat(x.unbind(1), -1))
        return torch.stack(output.chunk(x.shape[1], -1), 1)
