"""Written: checks that what user code writes in real steps does not depend on the records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from lightning_dp.errors import PrivacyError
from lightning_dp.sandbox.looks import Look
from lightning_dp.sandbox.refilling import Value, put_back
from lightning_dp.sandbox.sandbox import Sandbox
from lightning_dp.sandbox.writes import When, WriteWatch
from lightning_dp.trials import state_runs
from lightning_dp.trials.decisions import NUM_FEW
from lightning_dp.trials.given_records import Reread
from lightning_dp.trials.runs import TrialRuns
from lightning_dp.trials.state_check import LATER

Begin = Callable[[], AbstractContextManager[None]]


class Ran(NamedTuple):
    """A real batch.

    Args:
        parts: positions of the records of each of its microbatches; empty if unknown.
        look: at the state before it.
        counters: makes a context with the public counters of then.
        changed: what reading the records has changed, as it was before; empty if they changed nothing in a new way.
    """

    parts: list[list[int]]
    look: Look
    counters: Callable[[], AbstractContextManager[None]]
    changed: Sequence[Value] = ()

    @property
    def positions(self) -> list[int]:
        """Of the records of the last microbatch, which alone has an effect; empty if unknown."""
        return self.parts[-1] if self.parts else []

    @contextmanager
    def back_in(self) -> Iterator[None]:
        """Go back to the state and the counters before this batch within the context."""
        with self.counters(), self.look.back_in():
            put_back(self.changed)  # the look gives them their values of now back
            yield

    @contextmanager
    def numbers_back_in(self) -> Iterator[None]:
        """Go back to the counters before this batch, and to the numbers and words of its attributes."""
        with self.counters(), self.look.numbers_back_in():
            yield


class Written:
    """A watch of what real steps write, and the checks of it.

    A step writes in a new way when certain records come (a rare word, a loss below a threshold). The few records of a
    regular check may not show this, and once a state is set, no later run changes it again. So the batches that have
    written run once more, from the state before.

    Args:
        runs: run the user's step.
        sandbox: undoes the effects of the user's code.
    """

    def __init__(self, runs: TrialRuns, sandbox: Sandbox) -> None:
        self._runs, self._sandbox = runs, sandbox
        step = runs.step

        def look(last: Look | None = None) -> Look:
            return Look(step.parameters.layers, sandbox.others(), runs.host.attributes(), last)

        self.watch = WriteWatch(look, self.see, lambda: step.state.steps_taken)
        sandbox.aside, runs.look = self.watch.aside, look
        self.batches: deque[Ran] = deque(maxlen=2)
        """The real batch, and the one before it."""
        self._writers: list[Ran] = []  # those of them that have written something new

    def see(self, keys: Iterable[Any], when: When) -> None:
        """Take note of what the newest batch has written, and when."""
        if self._runs.loss_form.see_writes(keys, when, self._runs.step.state.step):
            self._writers += [*self.batches][:1]

    def begin(self, parts: list[list[int]], changed: Mapping[Any, Value]) -> None:
        """Begin a real batch.

        Args:
            parts: positions of the records of each of its microbatches; empty if unknown.
            changed: what reading the records has changed, by a key each, as it was before.
        """
        is_new = self._runs.loss_form.see_writes(changed, When.FORWARD, self._runs.step.state.step)
        ran = Ran(parts, self.watch.begin(), self._runs.host.counters(), [*changed.values()] if is_new else ())
        self.batches.appendleft(ran)
        self._writers += [ran] if is_new else []

    def check(
        self,
        seed: int,
        anywhere: Any = None,
        *,
        before: Look | None = None,
        begin: Begin | None = None,
        once: bool = False,
    ) -> None:
        """Check that what the last real batches have written does not depend on their records. Those that have written
        something new run once more, from the state and with the public counters of then.

        Args:
            seed: chooses the records that they are compared with.
            anywhere: tells whether a flag is set on any of the processes that run this check together.
            before: a state from which the newest batch runs too, such as that before a hook of a callback.
            begin: returns a context that leads on from that state to the one in which the newest batch began; None if
                it is that one.
            once: whether it cannot be called twice, so that an epoch must end before it, not after it.

        Raises:
            PrivacyError: it depends on them.
        """
        anywhere, batches = anywhere or self._runs.step.reduction.any, [*self.batches]
        writes = [anywhere(any(ran is one for one in self._writers)) for ran in batches]
        with self.watch.aside():
            for number, ran in enumerate(batches):
                real = self._runs.host.read(ran.positions) if ran.positions else []
                real = Reread(real, [*chain(*ran.parts)]) if real and ran.changed else real
                if writes[number] or not any(writes):
                    with ran.back_in():
                        self.check_state(seed, [real], anywhere)
                if number == 0 and before is not None:
                    with ran.counters(), before.back_in():
                        self.check_state(seed, [real], anywhere, begin, once=once)
        self._writers = []

    def check_state(
        self,
        seed: int = 0,
        real: Sequence[list[Any]] = (),
        anywhere: Any = None,
        begin: Begin | None = None,
        later: int = LATER,
        *,
        once: bool = False,
    ) -> None:
        """Check, outside of a real step, that the state after user code does not depend on the records.

        Args:
            seed: chooses the records.
            real: records of real batches.
            anywhere: see :meth:`check`.
            begin: see :meth:`check`.
            later: number of steps that follow.
            once: see :meth:`check`.

        Raises:
            PrivacyError: the state depends on the records.
        """
        host, checks = self._runs.host, self._runs.step.settings.check_per_sample
        few = host.records(NUM_FEW, seed=seed) if checks else []
        if len(few) > 1:
            with self._sandbox.enter() as snapshot, self._runs.progress():

                def compare(*ends: bool) -> None:
                    state_runs.check_state(self._runs, snapshot, few, real, anywhere, later, ends)

                ends, begun = [False, True], nullcontext() if begin is None else begin()
                if once:
                    used = self._runs.used.copy()
                    try:
                        compare(True)
                        ends = [False]
                    except PrivacyError:
                        raise
                    except Exception:  # the step needs it, as before the first epoch
                        snapshot.put_back()
                    finally:
                        self._runs.used = used  # the hook may freeze what the state before it trains
                with begun:
                    snapshot = snapshot if begin is None else self._sandbox.snapshot()
                    host.attempt(partial(compare, *ends), snapshot.put_back)
