"""The layouts that were inferred for operations on private parameters, and the choice of one for a use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import BatchAxis, CallLayout, Unclear
from lightning_dp.per_sample.tracking.nodes import Reporting

Key = tuple[str, int]
"""Name of an operation, and the lineage of a parameter (or function of parameters) in it."""

Plan = CallLayout | Unclear | None
"""Layout of one operation; None where it sees no samples."""


#: Reason for giving up an operation; takes the number of rows per sample.
UNORDERED = (
    "it gets {} rows per sample and the values do not show which rows belong to which sample (random layers must be "
    "off while the layout is learned)"
)


@dataclass
class Learned:
    """Plans by operation, in order of use.

    Args:
        plans: one plan for each use.
        spread: operations on parameters alone whose result has a batch axis.
        names: qualified names of the parameters that were followed.
        labels: of operations, for messages.
        by_order: names of operations of which the order of use decides which plan they have.
    """

    plans: dict[Key, list[Plan]] = field(default_factory=dict)
    spread: set[Key] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    labels: dict[Key, str] = field(default_factory=dict)
    by_order: set[str] = field(default_factory=set)
    _common: dict[Key, Plan] = field(default_factory=dict)

    def joined(self, other: Learned) -> Learned:
        """Return the plans of two ways to run; for each operation, those of the run that uses it more often."""
        plans = {
            key: max(self.plans.get(key, []), other.plans.get(key, []), key=len)
            for key in {**self.plans, **other.plans}
        }
        return Learned(plans, self.spread | other.spread, self.names | other.names, self.labels | other.labels)

    @property
    def has_folds(self) -> bool:
        """True if some use folds several rows of a sample into the batch axis."""
        return any(axis.multiplicity > 1 for axis in self._axes())

    def _axes(self) -> Iterator[BatchAxis]:
        for plans in self.plans.values():
            for plan in plans:
                if isinstance(plan, CallLayout):
                    yield from (axis for axis in (*plan.inputs, *plan.outputs) if isinstance(axis, BatchAxis))

    def pin(self) -> None:
        """Require from now on that each sample has as many rows as were seen."""
        for axis in self._axes():
            axis.pin()

    def close(self) -> tuple[str, Unclear] | None:
        """Give up operations of whose rows the order is still unknown; return the first one, and why."""
        first = None
        for key, plans in self.plans.items():
            for at, plan in enumerate(plans):
                if isinstance(plan, CallLayout) and (axes := plan.unordered):
                    plans[at] = doubt = Unclear(UNORDERED.format(axes[0].multiplicity))
                    first = first or (self.labels.get(key, key[0]), doubt)
        self.settle()
        return first

    def settle(self) -> None:
        """Find the operations whose uses are all alike."""
        self._common, self.by_order = {}, set()
        for key, plans in self.plans.items():
            if all(_alike(plans[0], other) for other in plans[1:]):
                self._common[key] = plans[0]
            else:
                self.by_order.add(key[0])

    def layout(self, key: Key, index: int) -> CallLayout | None:
        """Return the layout of the use of that number; None where it has none."""
        plans = self.plans.get(key, [])
        found = plans[index] if index < len(plans) else None
        return found if isinstance(found, CallLayout) else None

    def plan(
        self,
        key: Key,
        index_of: Callable[[Key], int | None],
        tensors: Sequence[Tensor],
        size: int,
        joined: frozenset[int | tuple[int, ...]] = frozenset(),
    ) -> CallLayout | str | None:
        """Return the plan of a use, or the reason for not having one.

        Args:
            key: of its operation.
            index_of: returns how many operations of its kind came before it; None in a recomputation.
            tensors: its first tensors, or all of them.
            size: number of samples.
            joined: see ``GradientEngine``.
        """
        found: Plan
        if key in self._common:
            found = self._common[key]
        else:
            plans = self.plans.get(key)
            if plans is None:
                return (
                    "got its first call later. Let the first batch use every layer (no layer dropped, no branch "
                    "skipped);"
                )
            index = index_of(key)
            if index is not None and index < len(plans) and _fits(plans[index], tensors, size):
                found = plans[index]
            else:
                fitting = [plan for plan in plans if _fits(plan, tensors, size)]
                if not fitting or not all(_alike(fitting[0], other) for other in fitting[1:]):
                    return (
                        f"got tensors of shapes {[tuple(t.shape) for t in tensors]}, unlike those of {len(plans)} "
                        "uses seen."
                    )
                found = fitting[0]
        if isinstance(found, Unclear):
            return f"but {found.reason}."
        if joined and found is not None and _is_at(found, tensors, joined):
            lengths = sorted(one for one in joined if isinstance(one, int))
            return (
                f"got records with unequal numbers of rows, {lengths} together. Equal numbers could give as "
                "many, but positions do not tell whose these are: let the batch name the record of each row "
                "(sample_of_row);"
            )
        return found


def _is_at(plan: CallLayout, tensors: Sequence[Tensor], lengths: frozenset[int | tuple[int, ...]]) -> bool:
    """Tell whether an axis over the samples has one of some lengths."""
    pairs = zip(plan.inputs, tensors, strict=False)
    return any(isinstance(axis, BatchAxis) and tensor.shape[axis.axis] in lengths for axis, tensor in pairs)


def _alike(one: Plan, other: Plan) -> bool:
    if isinstance(one, CallLayout) and isinstance(other, CallLayout):
        return one.agrees(other)
    return one == other


def _fits(plan: Plan, tensors: Sequence[Tensor], size: int) -> bool:
    if isinstance(plan, Unclear):
        return False
    if plan is None:
        return not any(tensor.requires_grad and not isinstance(tensor, Reporting) for tensor in tensors)
    for tensor, axis in zip(tensors, plan.inputs, strict=False):
        if isinstance(axis, BatchAxis):
            try:
                axis.rows_of_one(tensor, size, "")
            except PrivacyError:
                return False
    return True
