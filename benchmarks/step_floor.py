"""The least cost of a private step: multiplications and bytes, counted from the shapes of every layer.

Legend: ``B`` samples, ``T`` positions of a sample (of a convolution: ``S`` of its input), ``d`` in, ``p`` out, ``P``
trainable parameters.

    native step         3 B T d p multiplications per layer: forward, input gradient, weight gradient
    norms, T = 1        B (d + p): negligible
    norms, T > 1        Gram matrices, B T (T + 1) / 2 (d + p), half of each by symmetry
      of a convolution  those of its channels, B (S (S + 1) / 2 d + T (T + 1) / 2 p), where that is less
      or cached         the per-sample gradients, B T d p, replace the weight gradient; 4 B d p bytes are written
                        and, when they are summed, read (once, if norms are taken while they are in the cache)
    norms under a mask  B d p at T = 1, where (g^2)^T M (a^2) is a matrix product; else the per-sample gradients
    release             P normal draws, and 8 P bytes: noise over the batch size, written, and read with the mean

``step_cost.py`` measures the time of P draws into a buffer of that size, and the highest rates at which the machine
multiplies and reads. The least time of a step adds up: the step without privacy, the draws, the rest of the release,
and per layer the cheaper of Gram matrices and cached gradients. Operations without a product are left out:
normalisation layers, biases, embeddings, optimizers, the interpreter. So no step is faster than this, but a slower one
is not proven to waste time.
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
    """The added cost of one layer's norms: multiplications, or the bytes of cached gradients in their place."""

    norms: int
    masked: int
    kept_bytes: int


@dataclass
class Cost:
    """Cost of one step of one case; multiplications are multiply-adds."""

    parameters: int = 0
    native: int = 0
    layers: list[LayerCost] = field(default_factory=list)

    @property
    def norms(self) -> int:
        """Multiplications for the norms of all layers."""
        return sum(layer.norms for layer in self.layers)

    @property
    def masked(self) -> int:
        """Multiplications for the norms of all layers under a mask."""
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
        """Return the least time of a step on a machine with these rates (``step_machine.measure_rates``)."""
        mult, read = rates["mult_per_ms"], rates["bytes_per_ms"]
        norms = sum(
            min(layer.norms / mult, KEPT_PASSES * layer.kept_bytes / read if layer.kept_bytes else math.inf)
            for layer in self.layers
        )
        return plain_ms + draws_ms + norms + self.release_bytes / RELEASE_PASSES / read  # to write is in the draws


def cost_of(case: Case) -> Cost:
    """Count every linear layer and convolution of one step, from a forward of one sample."""
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
    """Return the number of distinct entries of a symmetric matrix."""
    return positions * (positions + 1) // 2


def counts_section(names: Iterable[str]) -> str:
    """Return the counts of these cases as a table."""
    lines = [
        "This table counts the least that a private step adds, layer by layer (`benchmarks/step_floor.py`). Norms come "
        "from Gram matrices, or from cached per-sample gradients, counted in bytes. Under a mask the norms need a "
        "product of the size of a weight gradient. The release draws one normal per parameter and passes over all of "
        "them. In the tables above, *least* is the ratio of the cheapest such step to a step without privacy: at the "
        "highest measured rates of the machine, with the fastest of 25 draws, and without layers that have no product.",
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
