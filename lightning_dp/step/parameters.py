"""PrivateParameters: the parameters that each optimizer currently trains, and the private accumulators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_dp.step.accumulator import Accumulator
from lightning_dp.system.torch_private import Layers


class PrivateParameters:
    """Parameters by optimizer, updated when layers are frozen or unfrozen.

    Args:
        module: the user's.
        optimizers: all of them.
        public: positions of optimizers whose gradients do not depend on the data.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], public: Collection[int]) -> None:
        self.layers, self._optimizers, self._public = Layers(module), optimizers, public
        self.accumulators: dict[int, Accumulator] = {}
        self._read: tuple[Any, ...] = ()
        self._recorded: dict[str, nn.Parameter] = {}
        self._taken: dict[str, set[int]] = {}  # parameters of several optimizers: who has collected its backprops

    def of(self, optimizer: int) -> dict[str, nn.Parameter]:
        """Return the private or trainable parameters of one optimizer by qualified name, in the module's order.

        A parameter counts if it is trainable now, or was private in an earlier step, because training steps switch
        ``requires_grad`` off and on within a batch.
        """
        return self._among(self.layers.now().named_parameters(), optimizer)

    def _among(self, named: Iterable[tuple[str, nn.Parameter]], optimizer: int) -> dict[str, nn.Parameter]:
        own = {id(p) for group in self._optimizers[optimizer].param_groups for p in group["params"]}
        known: Mapping[str, nn.Parameter] = (
            self.accumulators[optimizer].parameters if optimizer in self.accumulators else {}
        )
        return {name: p for name, p in named if id(p) in own and (p.requires_grad or known.get(name) is p)}

    def refresh(self, make: Callable[[Mapping[str, nn.Parameter]], Accumulator]) -> dict[str, nn.Parameter]:
        """Update the accumulators for the parameters that currently train; return the parameters to record.

        Private parameters are recorded, and trainable ones that no optimizer holds, so that no code sees their raw
        gradients.

        Args:
            make: parameters of one private optimizer -> accumulator.
        """
        named = self.layers.now().named_parameters()
        held = [[*map(id, group["params"])] for optimizer in self._optimizers for group in optimizer.param_groups]
        read = [(name, id(p), p.requires_grad, p.device) for name, p in named], held
        if (*read, self.accumulators) == self._read:
            return self._recorded
        public: set[str] = set()
        for index in range(len(self._optimizers)):
            parameters = self._among(named, index)
            if index in self._public:
                public |= parameters.keys()
            elif not parameters:
                self.accumulators.pop(index, None)
            elif index not in self.accumulators or not self.accumulators[index].holds(parameters):
                self.accumulators[index] = make(parameters)
        private = {name for accumulator in self.accumulators.values() for name in accumulator.names}
        self._read = *read, self.accumulators.copy()
        self._recorded = {name: p for name, p in named if name in private or (p.requires_grad and name not in public)}
        return self._recorded

    def collected(self, optimizer: int) -> list[str]:
        """Return the names of parameters whose backprops are no longer needed, after an optimizer collected its own.

        A parameter in several optimizers is part of the release of each.
        """
        names = self.accumulators[optimizer].names
        if len(self.accumulators) == 1:
            return names
        done = []
        for name in names:
            owners = {index for index, other in self.accumulators.items() if name in other.parameters}
            taken = self._taken.setdefault(name, set())
            taken.add(optimizer)
            if taken >= owners:
                done.append(name)
        self.forget(done)
        return done

    def names(self, optimizer: int) -> list[str]:
        """Return the names of the parameters that a private optimizer trains; none for a public one."""
        return self.accumulators[optimizer].names if optimizer in self.accumulators else []

    def forget(self, names: Iterable[str]) -> None:
        """Forget which optimizers collected the backprops of these parameters, because the backprops were freed."""
        for name in names:
            self._taken.pop(name, None)

    def is_private(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer holds a private parameter."""
        private = {id(p) for acc in self.accumulators.values() for p in acc.parameters.values()}
        return any(id(p) in private for group in optimizer.param_groups for p in group["params"])
