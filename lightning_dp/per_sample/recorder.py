"""Module hooks that keep inputs and backprops of a microbatch and keep autograd from computing weight gradients.

A unit is one module and those private parameters whose per-sample gradients its calls give. While a unit is called its
parameters are replaced by detached ones. Its output gets a hook (or, where nothing before it requires a gradient, a
tap) which hands the backprop to the record of the call; a record enters the unit's list with its first backprop, so
that calls without a backward cost nothing and die with their graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import tensors_of


def in_backward() -> bool:
    """Tell whether autograd is running a backward now: a forward in it is a recomputation (checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def keeps_graph() -> bool:
    """Tell whether the backward under way keeps its graph for another one (``retain_graph=True``) or may do so."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def version_of(tensor: Tensor) -> int:
    """Return the counter of in-place changes; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


class Recorder:
    """What the hooks of all units share: whether they record, for which microbatch, and the tap's source."""

    def __init__(self) -> None:
        self.active = False
        self.listening = True
        self.generation = 0
        self.batch_size = 0
        self.changes = 0
        self._sizes: dict[int, int] = {}
        self._sources: dict[torch.device, Tensor] = {}

    def begin(self, batch_size: int) -> None:
        """Record a microbatch of so many samples."""
        self.batch_size = batch_size
        self.active = True
        self._sizes = {}

    def count(self, tensor: Tensor) -> None:
        """Take note of the size of an input or output; layers share them: each counts once."""
        self._sizes[tensor.data_ptr()] = tensor.nbytes

    @property
    def num_bytes(self) -> int:
        """Size of the inputs and outputs of all calls of this microbatch."""
        return sum(self._sizes.values())

    def source(self, device: torch.device) -> Tensor:
        """Return an empty leaf that requires grad: what makes a tapped output require grad."""
        if device not in self._sources:
            self._sources[device] = torch.zeros(0, device=device, requires_grad=True)
        return self._sources[device]


class Record:
    """One call: what it saw and the backprops that came back for it."""

    __slots__ = (
        "args",
        "done",
        "generation",
        "index",
        "inputs",
        "kwargs",
        "names",
        "outputs",
        "parts",
        "unit",
        "versions",
    )

    def __init__(self, unit: Unit, frame: Frame, inputs: Iterable[Tensor], outputs: int = 1) -> None:
        self.unit = unit
        self.index = frame.index
        self.names = frame.names
        self.generation = unit.recorder.generation
        self.inputs = [tensor.detach() for tensor in inputs]
        self.versions = [version_of(tensor) for tensor in self.inputs]
        self.outputs = outputs
        # one entry a set of parameters that saw the same backprops: (a backprop an output, names)
        self.parts: list[tuple[list[Tensor | None], frozenset[str]]] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.done = False

    def receive(self, backprop: Tensor, output: int = 0) -> None:
        """Add a backprop of one output. Backprops of several backwards add up."""
        recorder = self.unit.recorder
        if not recorder.listening:
            return
        if not recorder.active or self.generation != recorder.generation:
            raise PrivacyError(
                f"Expected a backward through this microbatch only, got one through an earlier call of module "
                f"{self.unit.name!r}. Detach what is carried from batch to batch."
            )
        if torch.is_grad_enabled():
            raise PrivacyError(
                f"Expected a backward without create_graph, got create_graph=True through module {self.unit.name!r}. "
                "Gradient penalties need second derivatives, which only microbatch_size=1 supports."
            )
        if self.done:
            raise PrivacyError(
                f"Expected one backward through the call of module {self.unit.name!r}, got a second one. Give all but the last "
                "retain_graph=True."
            )
        recorder.changes += 1
        backprop = backprop.detach()
        if not self.parts:
            self.unit.records.append(self)
        if not self.parts or self.parts[-1][1] != self.names:
            self.parts.append(([None] * self.outputs, self.names))
        slots = self.parts[-1][0]
        known = slots[output]
        slots[output] = backprop if known is None else known + backprop
        self.unit.received(self)

    def forget(self, names: frozenset[str]) -> None:
        """Drop the backprops received so far for these parameters."""
        self.parts = [(slots, left) for slots, old in self.parts if (left := old - names)]

    def let_go(self) -> None:
        """Drop everything but what a further backward through the same graph would need, if there may be one."""
        self.parts = []
        if not keeps_graph():
            self.done = True
            self.inputs, self.versions = [], []
            self.args, self.kwargs = (), {}

    def check_unchanged(self) -> None:
        """Raise ``PrivacyError`` if an input was changed in place since the call."""
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            if version_of(tensor) != version:
                raise PrivacyError(
                    f"Expected the input of module {self.unit.name!r} to stay as it was until the backward, got one "
                    "modified in place. Use the out-of-place operation there; microbatch_size=1 shows where."
                )


class _Tap(torch.autograd.Function):
    """Pass a tensor on as a fresh member of the graph; what comes back for it goes to a record, and further back."""

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, source: Tensor, record: Record, number: int) -> Tensor:
        ctx.record, ctx.number = record, number
        # a plain alias, not a view of the output: an in-place operation may follow
        return output.detach()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.record.receive(grads[0], ctx.number)
        return grads[0] if ctx.needs_input_grad[0] else None, None, None, None


def tap(output: Tensor, record: Record, number: int = 0) -> Tensor:
    """Return the tensor as the outside is to see it: the gradient of the outside's uses alone goes to the record."""
    tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
        output, record.unit.recorder.source(output.device), record, number
    )
    return tapped


def tap_layer(output: Tensor, record: Record) -> Tensor:
    """As :func:`tap`, cheaper, for a layer whose output is fresh and not saved for its own backward.

    A hook does where an in-place operation moves it along; on a view it would be left behind on a dead branch of the
    graph, and a tensor that requires no grad cannot have one.
    """
    if not output.requires_grad:
        return tap(output, record)
    if output._is_view():
        output = torch.ops.aten._unsafe_view.default(output, output.shape)
    output.register_hook(record.receive)  # type: ignore[no-untyped-call]
    return output


class _Hook:
    """A hook that a copy or a pickle of the module does not take along."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return _Inert, ()


class _Inert(_Hook):
    """What a copied module has in place of a hook."""

    def __call__(self, *args: Any) -> None:
        return None


class _Before(_Hook):
    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.unit.enter(args, kwargs)


class _After(_Hook):
    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self.unit.leave(args, kwargs, output)


class Slot:
    """A private parameter at one of its places: owner module, local name, qualified name."""

    __slots__ = ("local", "name", "owner", "parameter")

    def __init__(self, owner: nn.Module, local: str, parameter: nn.Parameter, name: str) -> None:
        self.owner, self.local, self.parameter, self.name = owner, local, parameter, name

    def replace(self, tensor: Tensor) -> bool:
        """Put the tensor in place of the parameter; False if an enclosing call has done so."""
        held = self.owner._parameters
        if held.get(self.local) is not self.parameter:
            return False
        held[self.local] = tensor  # type: ignore[assignment]
        return True

    def restore(self) -> None:
        """Put the parameter back."""
        self.owner._parameters[self.local] = self.parameter


class Frame:
    """One call under way: its index (None in a recomputation), trainable names, replaced slots, a unit's note."""

    __slots__ = ("index", "names", "note", "replaced")

    def __init__(self, index: int | None, names: frozenset[str]) -> None:
        self.index = index
        self.names = names
        self.replaced: list[Slot] = []
        self.note: Any = None

    def restore(self) -> None:
        """Put the parameters back."""
        for slot in self.replaced:
            slot.restore()


class Unit:
    """One module whose calls are recorded for some parameters; subclasses say what is kept and computed.

    Args:
        recorder: shared state.
        module: the module that is hooked.
        name: its qualified name.
        slots: the parameters, each owned by the module or by one inside it.
    """

    def __init__(self, recorder: Recorder, module: nn.Module, name: str, slots: list[Slot]) -> None:
        self.recorder = recorder
        self.module = module
        self.name = name
        self.slots = slots
        self.names = frozenset(slot.name for slot in slots)
        self.records: list[Record] = []
        self.calls = 0
        self._frames: list[Frame | None] = []
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks, before any of the user's: they see the true output, and what the user returns."""
        if not self._handles:
            self._handles = [
                self.module.register_forward_pre_hook(_Before(self), prepend=True, with_kwargs=True),
                self.module.register_forward_hook(_After(self), prepend=True, with_kwargs=True, always_call=True),
            ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Forget every record; put back what an interrupted call has left replaced."""
        self.records = []
        self.calls = 0
        while self._frames:
            frame = self._frames.pop()
            if frame is not None:
                frame.restore()

    def enter(self, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: replace the parameters."""
        recorder = self.recorder
        if not recorder.active or not torch.is_grad_enabled() or not self._trains():
            self._frames.append(None)
            return None
        index: int | None = None
        if not in_backward():
            index = self.calls
            self.calls += 1
        trainable = [slot for slot in self.slots if slot.parameter.requires_grad]
        if not trainable:
            # switched off for this pass, such as a discriminator in its generator's step
            self._frames.append(None)
            return None
        whole = len(trainable) == len(self.slots)
        frame = Frame(index, self.names if whole else frozenset(slot.name for slot in trainable))
        self._frames.append(frame)
        for slot in trainable:
            if slot.replace(self.replacement(slot, frame)):
                frame.replaced.append(slot)
        return self.before(frame, args, kwargs)

    def _trains(self) -> bool:
        """Whether a backward would reach the parameters: not while ``toggle_optimizer`` holds them."""
        return any(slot.parameter.requires_grad for slot in self.slots)

    def leave(self, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook, also after an exception: restore the parameters, record the call."""
        frame = self._frames.pop() if self._frames else None
        if frame is None:
            return None
        frame.restore()
        return None if output is None else self.observe(frame, args, kwargs, output)

    def discard(self, names: frozenset[str]) -> None:
        """Drop the backprops received so far for these parameters; calls still in a graph stay alive."""
        for record in self.records:
            record.forget(names)
        self.records = [record for record in self.records if record.parts]

    # what a subclass says

    def received(self, record: Record) -> None:
        """Take note, within the backward, of a backprop that has reached a record."""

    def replacement(self, slot: Slot, frame: Frame) -> Tensor:
        """Return what stands in for the parameter during a call."""
        return slot.parameter.detach()

    def before(self, frame: Frame, args: Any, kwargs: Any) -> Any:
        """Return changed (args, kwargs) for the call, or None."""
        return None

    def observe(self, frame: Frame, args: Any, kwargs: Any, output: Any) -> Any:
        """Record a call that has returned; the result, unless None, takes the place of the output."""
        return None


def tap_all(output: Any, record: Record) -> Any:
    """Tap every floating tensor of a nested output."""
    if isinstance(output, Tensor):
        return tap(output, record)
    leaves, spec = pytree.tree_flatten(output)
    numbers = count()
    tapped = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            number = next(numbers)
            leaf = tap(leaf, record, number) if leaf.is_floating_point() else leaf
        tapped.append(leaf)
    return pytree.tree_unflatten(tapped, spec)


def main_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor a layer was called with."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    return tensors_of((args, kwargs))[0]
