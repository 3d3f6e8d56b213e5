"""LoopHost: runs the user's loss function on records, in trials and for real batches."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sized
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_dp.sampling import PrivateDataLoader
from lightning_dp.sandbox.held_functions import attributes_of, functions_in
from lightning_dp.sandbox.object_kinds import WAYS, own_classes
from lightning_dp.sandbox.surroundings import Surroundings
from lightning_dp.sandbox.user_variables import UserVariables
from lightning_dp.step import checks
from lightning_dp.trials.host import Host

LossFunction = Callable[[Any, Any], Any]
"""(model, batch) -> loss of shape () or (B,), or a mapping with "loss"; or a criterion."""


class LoopHost(Host):
    """The user's loss function, for the trials of the private step and for real batches.

    Args:
        model: first argument of the loss function.
        optimizer: optimizer of the model.
        loader: the private loader.
        move: moves a batch to the device.
        reduction: returns "mean" or "sum": how a scalar loss combines the samples.
        world_size: ranks.
        limit: most samples of a microbatch, or None.
        others: returns objects whose numbers, like those of the optimizer, must not depend on the records.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: PrivateDataLoader,
        move: Callable[[Any], Any],
        *,
        reduction: Callable[[], str],
        world_size: int,
        limit: int | None,
        others: Callable[[], list[Any]] = list,
    ) -> None:
        super().__init__(lambda: loader, move, world_size=world_size, limit=limit)
        self._model, self._optimizer, self._reduction, self._others = model, optimizer, reduction, others
        self.loss_fn: LossFunction = _no_loss
        self._loader = loader
        self._found: tuple[Any, Surroundings | None] = _no_loss, None  # of a loss function
        self._arguments: dict[str, Any] = {}  # of the loss function; the same object each time, so that looks are cheap
        self.see: Callable[[Any], None] = lambda batch: None
        """Called with each batch before the loss function runs on it."""
        self.intercept: Callable[[int], Any] = lambda optimizer: None
        """Called where the optimizer would step."""
        self.stepping: Callable[[Optimizer], Any] = nullcontext
        """Makes a context in which the optimizer may step."""

    @override
    def run(self, records: list[Any]) -> Any:
        """Collate records, run the loss function on the batch and return its output."""
        batch = self.training.batch_of(records, on_trial=True)
        self.see(batch)
        return self.loss(self._model, batch)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """Call the loss function; a criterion gets the model's outputs and the targets.

        Raises:
            TypeError: a criterion, and a batch that is no pair.
        """
        if not is_criterion(self.loss_fn):
            return self.loss_fn(model, batch)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            shown = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sized) else type(batch).__name__
            name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
            raise TypeError(
                f"Expected batches (inputs, targets) for the loss {name}, got {shown}. Pass a function (model, batch) "
                "-> loss."
            )
        inputs, targets = batch
        return self.loss_fn(model(inputs), targets)

    @override
    def loss_of(self, output: Any, count: int) -> Tensor:
        """Return the output of the loss function as a scalar that can be back-propagated.

        Raises:
            TypeError: something that is no loss.
            ValueError: a loss of another shape, or one without a gradient.
        """
        loss = checks.scalar_loss(output, count, self._reduction(), source="loss_fn")
        if loss is None:
            raise TypeError("Expected loss_fn to return a loss tensor, got None. Return the loss of shape () or (B,).")
        if not loss.requires_grad:
            raise ValueError(
                "Expected a loss with a gradient, got one that depends on no trainable parameter. Compute it from the "
                "model that loss_fn is given, outside of torch.no_grad."
            )
        return loss

    @override
    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @override
    def rehearse(self, closure: Callable[[], Any]) -> None:
        """Step the optimizer on the gradient that follows the closure."""
        closure()
        self.intercept(0)
        with self.stepping(self._optimizer):
            self._optimizer.step()

    @override
    def others(self) -> list[Any]:
        return [self._optimizer, *self._others()]

    @override
    def attributes(self) -> list[Any]:
        held = [one for one in held_by(self.loss_fn) if not isinstance(one, (types.FunctionType, types.ModuleType))]
        attributes = [vars(one) for one in held if isinstance(getattr(one, "__dict__", None), dict)]
        own = {f"{index} of the loss function": one for index, one in enumerate(held) if WAYS[type(one)]}
        self._arguments.clear()
        self._arguments.update(own)
        return [*attributes, self._arguments, *self._surroundings().watched]

    def _surroundings(self) -> Surroundings:
        """Return what surrounds the model, as the loss function names it."""
        known, found = self._found
        if known is not self.loss_fn or found is None:  # a loop may change its loss function
            owner: Any = getattr(self.loss_fn, "__self__", self.loss_fn)
            kinds = own_classes(owner.__class__)
            calls = [vars(kind).get("__call__") or vars(kind).get("forward") for kind in kinds]
            roots = [self._model, *(one for one in held_by(self.loss_fn) if isinstance(one, nn.Module))]
            layers = [layer for root in roots for layer in root.modules()]
            functions = functions_in([self.loss_fn, *attributes_of(owner), *calls])
            variables = UserVariables([self.loss_fn, *calls, *functions], kinds, layers)
            found = Surroundings([*self.others(), self._loader], self._model.parameters(), variables)
            self._found = self.loss_fn, found
        return found

    @override
    def saved(self) -> dict[str, Any]:
        return self._surroundings().settings()

    def reachable(self) -> list[Any]:
        """Return the objects, in addition to the model, whose state is restored after a trial."""
        return [*self.others(), *held_by(self.loss_fn), *self._surroundings().restored]

    def find_types(self) -> None:
        """Run the loss function on two records and record the narrowest dtype in ``narrow``; call it in the sandbox.

        Raises:
            ValueError: float16, whose gradients overflow or need scaling.
        """
        with _Types() as seen, torch.enable_grad():
            self.run(self.records(2))
        if torch.float16 in seen.types:
            raise ValueError(
                "Expected a loss function that computes with float32's range, got float16. Its gradients overflow or "
                "are scaled, which clipping would see: use bfloat16, as in torch.autocast(device, "
                "dtype=torch.bfloat16)."
            )
        self.narrow = torch.bfloat16 if torch.bfloat16 in seen.types else torch.float32


class _Types(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that records the dtypes of all results of torch operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.types |= {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def is_criterion(function: Any) -> bool:
    """Tell whether a loss function takes (outputs, targets): a module, or a function of ``torch.nn.functional``."""
    return isinstance(function, nn.Module) or getattr(function, "__module__", "") == nn.functional.__name__


def held_by(function: Any) -> list[Any]:
    """Return the objects that a function can reach: its owner, bound arguments, closure and global modules.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> held_by(lambda model, batch: layer(batch))
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    if isinstance(function, functools.partial):
        return [*held_by(function.func), *function.args, *function.keywords.values()]
    if isinstance(function, types.MethodType):
        return [function.__self__, *held_by(function.__func__)]
    if not isinstance(function, types.FunctionType):
        return [function]
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [*cells, *(value for value in named if isinstance(value, nn.Module))]


def move_to(device: torch.device, batch: Any) -> Any:
    """Move everything in a batch that has a ``to`` method to a device."""
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, batch)


def _no_loss(model: Any, batch: Any) -> Any:
    raise AssertionError("the loss function is set with every batch")
