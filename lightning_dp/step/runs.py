"""TrialRuns: runs of the user's step on a few records, without effect."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dp.step.probe import Probe
from lightning_dp.step.sandbox import Sandbox
from lightning_dp.step.snapshot import Snapshot
from lightning_dp.step.step import PrivateStep


class Host(Protocol):
    """The adapter that runs the user's step."""

    @property
    def batch_size(self) -> int:
        """Records of a real microbatch, as expected."""

    def records(self, num: int, seed: int = 0) -> list[Any]:
        """Return a few records from all over the training set, always the same for a seed."""

    def run(self, records: list[Any]) -> Any:
        """Collate records and run the user's step on them; return what it returned."""

    def loss_of(self, output: Any, count: int) -> Tensor | None:
        """Return the loss of an output as a scalar, if the host back-propagates it."""

    def others(self) -> list[Any]:
        """Return optimizers and schedulers."""

    @property
    def narrow(self) -> torch.dtype:
        """Narrowest type in which the step computes."""


class TrialRuns:
    """Runs the user's step on records within the sandbox.

    Args:
        step: the private step.
        host: runs the user's code.
        sandbox: keeps it without effect.
    """

    def __init__(self, step: PrivateStep, host: Host, sandbox: Sandbox) -> None:
        self.step, self.host, self.sandbox = step, host, sandbox

    def again(self, snapshot: Snapshot, records: list[Any], *, engine: bool = False, read: Any = None) -> Probe:
        """Run the step on records, and put the state back: several runs share one sandbox."""
        try:
            return self.run(records, engine=engine, read=read)
        finally:
            snapshot.put_back()

    def run(self, records: list[Any], *, engine: bool, read: Any = None) -> Probe:
        """Run the step on records within a sandbox that is entered already."""
        step, probe = self.step, Probe(self.step, engine=engine, read=read)
        with probe.attached(), step.microbatch(len(records)) if engine else ExitStack():
            output = self.host.run(records)
            if step.automatic:
                loss = self.host.loss_of(output, len(records))
                if loss is not None and loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                if engine:
                    step.engine.check_tracked()
                probe.collect(0)
        return probe
