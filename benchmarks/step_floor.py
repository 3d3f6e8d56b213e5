"""Where the floor of a private step is: multiplications and bytes, counted from the shapes of every layer.

Legend: ``B`` samples, ``T`` positions of a sample (of a convolution: ``S`` of its input), ``d`` in, ``p`` out, ``P``
trainable parameters.

    native step        3 B T d p multiplications a layer: forward, input gradient, weight gradient
    norms, T = 1       B (d + p): nothing beside it
    norms, T > 1       Gram matrices, B T (T + 1) / 2 (d + p), half of each for symmetry; a convolution's from those of
    its
                       channels, B (S (S + 1) / 2 d + T (T + 1) / 2 p), where that is less
    or kept            the per-sample gradients, B T d p, replace the weight gradient, and 4 B d p bytes are written
    and, when
                       they are summed up, read (once, if norms are taken while they are in the cache)
    norms under a mask B d p at T = 1, where (g^2)^T M (a^2) is a matrix product; else the per-sample gradients
    release            P normal draws, and 8 P bytes: noise divided by the batch size, written, and read when the mean
    is added

What P draws take, written into a buffer of that size, is measured by ``step_cost.py``, and so is how fast the machine
multiplies and reads at best. With these, the least time of a step: that without privacy, the draws, what is left of the
release, and of each layer the cheaper of Gram matrices and kept gradients. Left out is what has no product:
normalisation layers, biases, embeddings, optimizers, the interpreter. So no step is faster, and one that takes longer
is not by that proven to be slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case

FLOAT = 4
RELEASE_PASSES = 2
KEPT_PASSES = 2


@dataclass(frozen=True)
class LayerCost:
    """What the norms of one layer add: multiplications, or the bytes of what is kept in their place."""

    norms: int
    masked: int
    kept_bytes: int


@dataclass
class Cost:
    """Counts of one step of one case; multiplications count multiply-adds."""

    parameters: int = 0
    native: int = 0
    layers: list[LayerCost] = field(default_factory=list)

    @property
    def norms(self) -> int:
        """Multiplications for the norms of all layers."""
        return sum(layer.norms for layer in self.layers)

    @property
    def masked(self) -> int:
        """The same under a mask."""
        return sum(layer.masked for layer in self.layers)

    @property
    def kept_bytes(self) -> int:
        """Size of the per-sample gradients of layers with several positions."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def release_bytes(self) -> int:
        """Traffic of the noise; the mean is added to it."""
        return RELEASE_PASSES * FLOAT * self.parameters

    def least_ms(self, plain_ms: float, draws_ms: float, rates: dict[str, float]) -> float:
        """The least time of a step on a machine of these rates (``step_machine.measure_rates``)."""
        mult, read = rates["mult_per_ms"], rates["bytes_per_ms"]
        norms = sum(
            min(layer.norms / mult, KEPT_PASSES * layer.kept_bytes / read if layer.kept_bytes else math.inf)
            for layer in self.layers
        )
        return plain_ms + draws_ms + norms + self.release_bytes / RELEASE_PASSES / read  # to write is in the draws


def cost_of(case: Case) -> Cost:
    """Counts every linear layer and convolution of one step, from a forward of one sample."""
    module, size = case.make_network(), case.batch_size
    cost = Cost(parameters=sum(p.numel() for p in module.parameters() if p.requires_grad))
    positions: dict[nn.Module, tuple[int, int]] = {}

    def see(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        num_out = output.numel() // weight.shape[0]
        num_in = inputs[0].numel() // weight.shape[1]
        trained = weight.requires_grad
        cost.native += size * num_out * weight.numel() * (3 if trained else 2)
        if trained:
            before = positions.get(layer, (0, 0))
            positions[layer] = (before[0] + num_in, before[1] + num_out)

    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        module(case.make_inputs(1))
    for handle in handles:
        handle.remove()
    for layer, (num_in, num_out) in positions.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        patch, product = weight[0].numel(), num_out * weight.numel()
        backprops = _half(num_out) * weight.shape[0]
        inputs = min(_half(num_out) * patch, _half(num_in) * weight.shape[1])
        norms = weight.shape[0] + patch if num_out == 1 else min(inputs + backprops, product)
        kept = FLOAT * size * weight.numel() if num_out > 1 else 0
        cost.layers.append(LayerCost(size * norms, size * product, kept))
    return cost


def _half(positions: int) -> int:
    """Entries of a symmetric matrix."""
    return positions * (positions + 1) // 2


def counts_section(names: Iterable[str]) -> str:
    """The counts of these cases as a table."""
    lines = [
        "What is counted here is the least that a private step adds, layer by layer (`benchmarks/step_floor.py`): "
        "norms from Gram matrices, or the bytes of the per-sample gradients where these are kept in their place; "
        "under a mask the norms need a product of the size of a weight gradient; and the release draws a normal for "
        "each parameter and passes over them. Above, *least* is what the cheaper of these takes, layer by layer, at "
        "the highest rates that the machine was seen to multiply and read at, with the fastest of 25 draws, beside a "
        "step without privacy; what has no product is left out of it.",
        "",
        "| case | parameters, M | native, M mult. | norms | norms under a mask | kept instead, MB | release, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cost = cost_of(CASES[name])
        cells = [
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.native / 1e6:.0f}",
            f"+ {cost.norms / cost.native:.1%}",
            f"+ {cost.masked / cost.native:.1%}",
            f"{cost.kept_bytes / 1e6:.0f}",
            f"{cost.release_bytes / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
