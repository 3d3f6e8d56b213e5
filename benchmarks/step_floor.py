"""Where the floor of a private step is: multiplications and bytes, counted from the shapes of every layer.

Legend: ``B`` samples, ``T`` positions of a sample, ``d`` in, ``p`` out, ``P`` trainable parameters.

    native step        3 B T d p multiplications a layer: forward, input gradient, weight gradient
    norms, T = 1       B (d + p): nothing beside it
    norms, T > 1       Gram matrices, B T (T + 1) / 2 (d + p), half of each for symmetry; or the per-sample gradients,
                       B T d p, kept: then they replace the weight gradient, and 4 B d p bytes are written and read twice
    norms under a mask B d p at T = 1, where (g^2)^T M (a^2) is a matrix product; else the per-sample gradients
    release            P normal draws, and 8 P bytes: noise divided by the batch size, written, and read when the mean is added

What P draws take, written into a buffer of that size, is measured by ``step_cost.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case

FLOAT = 4
RELEASE_PASSES = 2


@dataclass
class Cost:
    """Counts of one step of one case; multiplications count multiply-adds."""

    parameters: int = 0
    native: int = 0
    norms: int = 0
    masked: int = 0
    kept_bytes: int = 0

    @property
    def release_bytes(self) -> int:
        """Traffic of the noise; the mean is added to it."""
        return RELEASE_PASSES * FLOAT * self.parameters


def cost_of(case: Case) -> Cost:
    """Counts every linear layer and convolution of one step, from a forward of one sample."""
    module, size = case.make_network(), case.batch_size
    cost = Cost(parameters=sum(p.numel() for p in module.parameters() if p.requires_grad))
    positions: dict[nn.Module, int] = {}

    def see(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        seen = output.numel() // weight.shape[0]
        trained = weight.requires_grad
        cost.native += size * seen * weight.numel() * (3 if trained else 2)
        if trained:
            positions[layer] = positions.get(layer, 0) + seen

    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(see) for layer in layers]
    with torch.no_grad():
        module(case.make_inputs(1))
    for handle in handles:
        handle.remove()
    for layer, seen in positions.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        widths, product = weight.shape[0] + weight[0].numel(), seen * weight.numel()
        gram = seen * (seen + 1) // 2 * widths
        cost.norms += size * (widths if seen == 1 else min(gram, product))
        cost.masked += size * product
        if seen > 1:
            cost.kept_bytes += FLOAT * size * weight.numel()
    return cost


def floor_section(cases: dict[str, Any]) -> str:
    """The counts of these cases as a table, with what noise alone takes where it was measured."""
    lines = [
        "What is counted below is the least that a private step adds, layer by layer (`benchmarks/step_floor.py`): norms from "
        "Gram matrices, or the bytes of the per-sample gradients where these are kept in their place; under a mask the "
        "norms need a product of the size of a weight gradient; and the release draws a normal for each parameter and passes "
        "over them. The last two columns are what these draws alone take, and a step that adds nothing else.",
        "",
        "| case | parameters, M | native, M mult. | norms | norms under a mask | kept instead, MB | release, MB | draws, ms | "
        "plain and draws |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, held in cases.items():
        cost = cost_of(CASES[name])
        draws, plain = held.get("noise", {}).get("ms"), held["time"].get("ours", {}).get("plain_ms")
        cells = [
            f"{cost.parameters / 1e6:.2f}",
            f"{cost.native / 1e6:.0f}",
            f"+ {cost.norms / cost.native:.1%}",
            f"+ {cost.masked / cost.native:.1%}",
            f"{cost.kept_bytes / 1e6:.0f}",
            f"{cost.release_bytes / 1e6:.0f}",
            "-" if draws is None else f"{draws:.1f}",
            "-" if draws is None or plain is None else f"{1 + draws / plain:.2f}",
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)
