"""Units of a sharded module (FSDP2): groups of parameters that are gathered, used and freed together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_dp.system.local import is_sharded


@dataclass(frozen=True)
class Unit:
    """A module to which ``fully_shard`` was applied.

    Args:
        module: the module, which gathers and frees its parameters.
        whole: qualified name -> tensor that a forward computes with; it has memory only while the unit is gathered.
    """

    module: Any
    whole: dict[str, nn.Parameter]

    @contextmanager
    def gathered(self, wanted: bool = True) -> Iterator[None]:
        """Gather the parameters within the block, if wanted; every rank must pass the same value."""
        if wanted:
            self.module.unshard()
        try:
            yield
        finally:
            if wanted:
                self.module.reshard()


def find_units(module: nn.Module) -> list[Unit]:
    """Return the units of a module that hold parameters of their own, outer ones first.

    Every unit is gathered once: the tensors that a forward computes with exist from then on, and stay the same objects.

    Args:
        module: the user's; all of its sharded parameters belong to a unit.
    """
    sharded = {name: parameter for name, parameter in module.named_parameters() if is_sharded(parameter)}
    units: list[Unit] = []
    known: set[str] = set()
    for each in module.modules():
        if is_unit(each):
            unit = Unit(each, {})
            with unit.gathered():
                now = dict(module.named_parameters())
                unit.whole.update(
                    {name: now[name] for name, p in sharded.items() if now[name] is not p and name not in known}
                )
            known |= unit.whole.keys()
            if unit.whole:
                units.append(unit)
    return units


def is_unit(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was applied to this module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def roots(module: nn.Module) -> list[Any]:
    """Return the outermost units of a module."""
    if is_unit(module):
        return [module]
    return [root for child in module.children() for root in roots(child)]


def settle(module: nn.Module) -> None:
    """Free all gathered parameters."""
    for each in module.modules():
        if is_unit(each):
            each.reshard()  # type: ignore[operator]


def recover(module: nn.Module) -> None:
    """Free all gathered parameters after an exception in the middle of a forward or backward."""
    for root in roots(module):
        with suppress(AttributeError):  # no forward has begun yet, or a torch before 2.13, which has no recovery
            root.reset_iter_state()
    settle(module)


def start_equal(module: nn.Module) -> None:
    """Copy buffers, and parameters that are not sharded, from rank 0 to every rank."""
    replicated = [parameter for parameter in module.parameters() if not is_sharded(parameter)]
    for tensor in [*replicated, *module.buffers()]:
        held = tensor.detach()
        sent = held.contiguous()  # collectives take no other layout
        dist.broadcast(sent, src=0)
        if sent is not held:
            held.copy_(sent)
