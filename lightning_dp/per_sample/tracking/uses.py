"""One use of private parameters in an operation: its activation, and the backprops of its output.

While an operation runs, its private parameters are detached values. Its output gets a hook that passes the backprop to
the use, or a tap if the output requires no gradient. A use enters its source's list with its first backprop, so that
uses without a backward cost nothing and are freed with their graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import adds_to_leaves, backward_number, is_view, keeps_graph, own_view
from lightning_dp.per_sample.layout import TWICE, WAY_OUT
from lightning_dp.system.torch_private import changes_of, num_changes

if TYPE_CHECKING:
    from lightning_dp.per_sample.joining import Joining
    from lightning_dp.per_sample.layout import BatchAxis
    from lightning_dp.per_sample.owners.owned import OwnedAxis
    from lightning_dp.per_sample.sources import Source


FEW = 2**15
"""Numbers up to which the calls of torch cost more than the arithmetic."""

MOST_WAITING = 2**20
"""Numbers of all inputs and backprops that are kept until the end of the backward although they could be freed."""


class Recorder:
    """State of one microbatch that all its uses share."""

    def __init__(self) -> None:
        self.active = False
        self.listening = True
        self.generation = 0
        self.batch_size = 0
        self.joining: Joining | None = None
        self.changes = 0
        self.num_bytes = 0
        """Total size, in bytes, of the tensors that :meth:`count` received in the largest microbatch."""
        self._sizes: dict[int, int] = {}
        self._largest, self._counts = -1, False
        self._num_waiting = 0
        self._backward, self._adds = -1, True
        self._taps: dict[torch.device, Tensor] = {}
        self.constants: list[tuple[Hashable, Tensor]] = []
        """Tensors that functions of parameters meet in this microbatch, with the operation and the function."""

    def begin(self, batch_size: int, joining: Joining | None = None) -> None:
        """Start recording a microbatch of ``batch_size`` records; each is a sample, unless ``joining`` joins
        several.
        """
        self.batch_size, self.joining = batch_size, joining
        self.active = True
        self._counts, self._num_waiting = batch_size > self._largest, 0
        if self._counts:  # a smaller one holds less
            self._largest, self._sizes, self.num_bytes = batch_size, {}, 0

    def noted(self, key: Hashable, constant: Tensor) -> Tensor:
        """Take note of a tensor without samples that a function of parameters meets, and return it."""
        self.constants.append((key, constant))
        return constant

    def may_wait(self, num: int) -> bool:
        """Tell whether so many numbers are few enough to keep them until the end of the backward."""
        if num > FEW or self._num_waiting + num > MOST_WAITING:
            return False
        self._num_waiting += num
        return True

    def counts_backward(self) -> bool:
        """Tell whether the backward that runs now counts: one of ``torch.autograd.grad`` gives parameters nothing."""
        if (number := backward_number()) != self._backward:
            self._backward, self._adds = number, adds_to_leaves()
        return self._adds

    @property
    def num_samples(self) -> int:
        """Number of samples: users if records have owners, else records."""
        return self.batch_size if self.joining is None else self.joining.num

    def end(self) -> None:
        """Stop recording; a backprop that arrives later for this microbatch is refused."""
        self.active, self.constants = False, []
        self.generation += 1
        self.changes += 1

    def count(self, tensor: Tensor) -> None:
        """Add the size of an input or output to :attr:`num_bytes`; a tensor that layers share counts once."""
        if not self._counts:
            return
        place, size = tensor.data_ptr(), tensor.nbytes
        self.num_bytes += size - self._sizes.get(place, 0)
        self._sizes[place] = size

    def tap_source(self, device: torch.device) -> Tensor:
        """Return an empty leaf that requires grad; it makes a tapped output require grad."""
        if device not in self._taps:
            self._taps[device] = torch.zeros(0, device=device, requires_grad=True)
        return self._taps[device]


class Use:
    """One operation with private parameters: its activation, the axes of the samples, and the backprops of its
    output.
    """

    __slots__ = (
        "arguments",
        "done",
        "generation",
        "in_axis",
        "inputs",
        "keys",
        "out_axis",
        "parts",
        "source",
        "versions",
    )

    def __init__(
        self,
        source: Source,
        inputs: Iterable[Tensor],
        in_axis: BatchAxis | OwnedAxis | None,
        out_axis: BatchAxis | OwnedAxis,
        keys: frozenset[Hashable] | None = None,
    ) -> None:
        self.source = source
        self.keys = source.keys if keys is None else keys
        self.generation = source.recorder.generation
        self.inputs = [*map(Tensor.detach, inputs)]
        self.versions = changes_of(self.inputs)
        self.in_axis, self.out_axis = in_axis, out_axis
        # of a registered operation: returns its arguments with the rows of the samples first, given how to lay them out
        self.arguments: Callable[[int, Callable[[Tensor, int], Tensor]], dict[str, Any]] | None = None
        # pairs of a backprop and its keys
        self.parts: list[tuple[Tensor, frozenset[Hashable]]] = []
        self.done = False

    def receive(self, backprop: Tensor) -> None:
        """Record a backprop, added to the backprops of earlier backwards through this use."""
        source = self.source
        recorder = source.recorder
        if not recorder.listening:
            return
        if not recorder.active or self.generation != recorder.generation:
            raise PrivacyError(
                f"Expected a backward through this microbatch only, got one through an earlier {source}. Detach "
                "what is carried from batch to batch."
            )
        if torch.is_grad_enabled():
            raise PrivacyError(
                f"Expected a backward without create_graph, {TWICE} {source}. "
                "Second derivatives of this use need grad_sample='single'."
            )
        if not recorder.counts_backward():
            return
        if self.done:
            raise PrivacyError(
                f"Expected one backward through {source}, got a second one. Give all but the last retain_graph=True."
            )
        recorder.changes += 1
        backprop = backprop.detach()
        if not self.parts:
            source.uses.append(self)
        if self.parts and self.parts[-1][1] == self.keys:
            self.parts[-1] = (self.parts[-1][0] + backprop, self.keys)
        else:
            self.parts.append((backprop, self.keys))
        source.received(self)

    def forget(self, keys: frozenset[Hashable]) -> None:
        """Drop the backprops received so far for these keys."""
        self.parts = [(backprop, left) for backprop, old in self.parts if (left := old - keys)]

    def release(self) -> None:
        """Free everything except what another backward through the same graph would need, if one may follow."""
        self.parts = []
        if (self.inputs or self.arguments is not None) and not keeps_graph():
            self.done = True
            self.inputs, self.versions = [], ()
            self.arguments = None

    def check_unchanged(self) -> None:
        """Raise ``PrivacyError`` if an input was changed in place since the operation ran."""
        for tensor, version in zip(self.inputs, self.versions, strict=True):
            if num_changes(tensor) != version:
                raise PrivacyError(
                    f"Expected the input of {self.source} to stay as it was until the backward, got one "
                    "modified in place. Use the out-of-place operation there; grad_sample='single' shows where."
                )


class _Tap(torch.autograd.Function):
    """An identity operation that passes its gradient both to a use and further back through the graph."""

    @staticmethod
    @override
    def forward(ctx: Any, output: Tensor, source: Tensor, use: Use) -> Tensor:
        ctx.use = use
        # a plain alias, not a view of the output: an in-place operation may follow
        return output.detach()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.use.receive(grads[0])
        return grads[0] if ctx.needs_input_grad[0] else None, None, None


def tap(output: Tensor, use: Use) -> Tensor:
    """Return the output connected to a use, which receives the gradient of the output."""
    tapped: Tensor = _Tap.apply(output, use.source.recorder.tap_source(output.device), use)  # type: ignore[no-untyped-call]
    return tapped


def tap_copies(copies: Tensor, use: Use) -> Tensor:
    """Connect copies of a detached leaf to a use, which receives their gradient; the leaf receives none.

    Args:
        copies: result of ``expand``, of which nothing else is computed from that leaf.
        use: receives the gradient.
    """

    def take(grads: tuple[Tensor | None, ...]) -> tuple[None]:
        if grads[0] is not None:
            use.receive(grads[0])
        return (None,)

    if copies.grad_fn is None:  # torch.func keeps graphs of its own
        raise PrivacyError(
            f"Expected {use.source} to be part of the graph of the batch, got a call within torch.func.grad or another "
            f"transform of torch.func, which keeps a graph of its own. {WAY_OUT}."
        )
    copies.grad_fn.register_prehook(take)
    return copies


def tap_output(output: Tensor, use: Use) -> Tensor:
    """Connect an output to a use like :func:`tap`, at less cost, if the operation's own backward does not need the
    output.

    An ordinary output gets a hook on its node of the graph, which sees what hooks of the user's on the output have made
    of the gradient, and which later in-place operations leave alone. A view is replaced by an alias first, because its
    node may be replaced. An output that requires no grad has no node and gets a tap.
    """
    if not output.requires_grad:
        return tap(output, use)
    if is_view(output):
        output = own_view(output)
    number, node = output.output_nr, output.grad_fn
    assert node is not None

    def receive(grads: tuple[Tensor | None, ...]) -> None:
        backprop = grads[number]
        if backprop is not None:
            use.receive(backprop)

    node.register_prehook(receive)
    return output
