"""Written: checks that what user code writes in real steps does not depend on the records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_dp.step.couplings import Couplings
from lightning_dp.step.decisions import NUM_FEW
from lightning_dp.step.runs import TrialRuns
from lightning_dp.step.sandbox import Sandbox
from lightning_dp.step.writes import Look, WriteWatch


class Written:
    """A watch of what real steps write, and the checks of it.

    A step writes in a new way when certain records come (a rare word, a loss below a threshold). The few records of a
    regular check may not show this, and once a state is set, no later run changes it again. So the batches that have
    written run once more, from the state before.

    Args:
        runs: run the user's step.
        couplings: compare states.
        sandbox: undoes the effects of the user's code.
    """

    def __init__(self, runs: TrialRuns, couplings: Couplings, sandbox: Sandbox) -> None:
        self._runs, self._couplings, self._sandbox = runs, couplings, sandbox
        self.see, layers = runs.loss_form.see_writes, runs.step.parameters.layers
        self.watch = WriteWatch(lambda last: Look(layers, sandbox.others(), runs.host.attributes(), last), self.see)
        self.batches: deque[list[int]] = deque(maxlen=2)
        """Positions of the records of the real batch, and of the one before it; empty if unknown."""

    def check(
        self, before: Look | None, seed: int, anywhere: Any = None, *, begin: Callable[[], Any] | None = None
    ) -> None:
        """Check that what the last real batches have written does not depend on their records.

        Args:
            before: the state before they wrote.
            seed: chooses the records that they are compared with.
            anywhere: tells whether a flag is set on any of the processes that run this check together.
            begin: leads on from that state to the one in which the first of the batches began; None if it is that one.

        Raises:
            PrivacyError: it depends on them.
        """
        assert before is not None
        real = [self._runs.host.read(positions) if positions else [] for positions in self.batches]
        with before.back_in():
            self.check_state(seed, real, anywhere, begin)
        self.watch.renew()

    def check_state(
        self,
        seed: int = 0,
        real: Sequence[list[Any]] = (),
        anywhere: Any = None,
        begin: Callable[[], Any] | None = None,
    ) -> None:
        """Check, outside of a real step, that the state after user code does not depend on the records.

        Args:
            seed: chooses the records.
            real: records of real batches.
            anywhere: see :meth:`check`.
            begin: see :meth:`check`.

        Raises:
            PrivacyError: the state depends on the records.
        """
        host, checks = self._runs.host, self._runs.step.settings.check_per_sample
        few = host.records(NUM_FEW, seed=seed) if checks else []
        if len(few) > 1:
            with self._sandbox.enter() as snapshot, self._runs.progress():
                if begin is not None:
                    begin()
                    snapshot = self._sandbox.snapshot()
                check = partial(self._couplings.check_state, snapshot, few, real, anywhere)
                host.attempt(check, snapshot.put_back)
        self.watch.renew()
