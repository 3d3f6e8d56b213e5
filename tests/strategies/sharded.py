"""Modules that shard themselves, and the cases in which a sharded run must release what one process releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from lightning_dp import MagnitudePruning, RandomSparsification
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier


class Sharded(Classifier):
    """A classifier that shards every block of its network where a mesh is given, and the whole network around them.

    Args:
        network: a sequence of blocks.
        shard: arguments of ``fully_shard``.
        options: of ``Classifier``.
    """

    def __init__(
        self, network: nn.Module | None = None, shard: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.shard = dict(shard or {})

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        for block in self.network:
            if any(True for _ in block.parameters(recurse=True)):
                fully_shard(block, mesh=mesh["data_parallel"], **self.shard)
        fully_shard(self.network, mesh=mesh["data_parallel"], **self.shard)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES))


class Scaled(nn.Module):
    """A parameter of its own that no child unit gathers, a frozen layer, and a weight norm: a function of
    parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(NUM_FEATURES, 5))
        self.gain = nn.Parameter(torch.rand(5) + 0.5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.last = nn.Linear(5, NUM_CLASSES)

    def __iter__(self) -> Any:
        return iter([self.first, self.last])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.frozen(self.first(x).tanh() * self.gain).tanh())


class Tied(nn.Module):
    """One weight in two layers, of an odd number of rows, and recomputation in the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(NUM_FEATURES, 5, bias=False)
        self.block = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
        self.head = nn.Linear(NUM_FEATURES, 5, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def __iter__(self) -> Any:
        return iter([self.block, self.out])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).tanh()
        hidden = hidden + checkpoint(self.block, hidden, use_reentrant=False)
        return self.out(nn.functional.linear(hidden, self.head.weight.T))


class Adapter(nn.Module):
    """A frozen layer with a low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base = nn.Linear(NUM_FEATURES, NUM_CLASSES).requires_grad_(False)
        self.down, self.up = nn.Linear(NUM_FEATURES, 2, bias=False), nn.Linear(2, NUM_CLASSES, bias=False)

    def __iter__(self) -> Any:
        return iter([self.base])

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


#: Attacks of one rank on another that the default tests run under FSDP too; the slow tests run the rest.
ALSO_SHARDED = ("shuffled", "moved")
#: attacks that are found where a rank compares its batch with its records alone; with shards all ranks would have to
NOT_SHARDED = ("next to one", "gathered figure", "mean of a figure")
#: name -> network, arguments of fully_shard, options of the strategy, callbacks, options of the Trainer
CASES: dict[
    str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any], Callable[[], list[Any]], dict[str, Any]]
] = {
    "flat": (plain, {}, {}, list, {}),
    "kept after forward, microbatches": (plain, {"reshard_after_forward": False}, {"microbatch_size": 7}, list, {}),
    "per layer": (plain, {"reshard_after_forward": True}, {"clipping": "per_layer"}, list, {}),
    "automatic": (Scaled, {}, {"clipping": "automatic"}, list, {}),
    "weight norm, frozen": (Scaled, {"reshard_after_forward": True}, {}, list, {}),
    "tied, recomputed": (Tied, {}, {"clipping": "per_layer"}, list, {}),
    "adapter": (Adapter, {}, {}, list, {}),
    "accumulated": (plain, {}, {}, list, {"accumulate_grad_batches": 2}),
    "masked": (
        plain,
        {},
        {"seed": 3},
        lambda: [RandomSparsification(final_rate=0.6, schedule="constant", seed=5)],
        {},
    ),
    "pruned": (plain, {}, {}, lambda: [MagnitudePruning(0.5)], {}),
    "bfloat16": (
        plain,
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {},
        list,
        {},
    ),
}
#: Cases that repeat others: clipping per layer is in "tied, recomputed", and all microbatches accumulate.
REPEATED = ("per layer", "automatic", "adapter", "accumulated")
