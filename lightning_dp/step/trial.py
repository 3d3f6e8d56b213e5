"""Trial: what is learned and checked by running the user's step on a few records, in the sandbox.

The batch axis of every layer, whether samples are independent, and whether an optimizer's steps depend on the samples.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness
from lightning_dp.per_sample.independence import compare_with_singles
from lightning_dp.step import exchange, state_check
from lightning_dp.step.probe import Probe
from lightning_dp.step.randomness import seed_generators, seed_low_or_high
from lightning_dp.step.sandbox import Sandbox
from lightning_dp.step.snapshot import Snapshot
from lightning_dp.step.step import PrivateStep

#: Sizes at which the layout is learned; both are made of the same two samples, so that padded lengths agree.
LAYOUT_SIZES = (2, 3)
#: Records of the comparison with single runs, and of the small batches of the exchange test.
NUM_ALONE, NUM_SMALL, NUM_SPREAD = 3, 4, 9
#: Relative tolerance of the comparison with single runs, by the narrowest type that takes part.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
#: Quantiles of the coins of a batch: a branch that is taken with a probability of 0.1 or of 0.9 is tried.
LOW, MIDDLE, HIGH = 0.02, 0.5, 0.98


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


class Trial:
    """Runs the user's step on a few records, without effect, and judges what it sees.

    Args:
        step: the private step.
        host: runs the user's code.
        sandbox: keeps it without effect.
    """

    def __init__(self, step: PrivateStep, host: Host, sandbox: Sandbox) -> None:
        self._step, self._host, self._sandbox = step, host, sandbox

    def prepare(self) -> None:
        """Learn the layout, and check on records from all over the training set that samples are independent.

        Raises:
            PrivacyError: a sample's gradient depends on another sample, or state on the samples.
        """
        settings, step = self._step.settings, self._step
        records = self._host.records(NUM_SPREAD)
        with self._sandbox.enter() as snapshot:
            if not settings.runs_samples_alone:
                pair = (records * 2)[:2]
                seed_generators(0)
                with FrozenRandomness():
                    step.engine.learn_layout(
                        lambda size: self._again(snapshot, (pair * size)[:size]), sizes=LAYOUT_SIZES
                    )
            if settings.check_per_sample and len(records) > 1:
                self._check_state(snapshot, records)
                if not settings.runs_samples_alone:
                    self._check_alone(snapshot, _different(records)[:NUM_ALONE])
                    self._check_exchange(snapshot, records)
        if settings.check_per_sample and len(records) > 1:
            step.unchecked_public = set(settings.public_optimizers)

    def check_again(self, number: int) -> None:
        """Repeat, at a public step, what a later branch of the user's code may have changed.

        Args:
            number: of the logical step; chooses the records.

        Raises:
            PrivacyError: as :meth:`prepare`.
        """
        if not self._step.settings.check_per_sample:
            return
        with self._sandbox.enter() as snapshot:
            few = self._host.records(3, seed=number)
            if len(few) > 1:
                self._check_state(snapshot, few)
            if not self._step.settings.runs_samples_alone:
                self._exchange_one(snapshot, self._real_records(number), seed=number)

    def _real_records(self, seed: int) -> list[Any]:
        """Return records for a batch of the real size, and a few more."""
        return self._host.records(self._host.batch_size + NUM_SMALL, seed=seed)

    # ---------------------------------------------------------------- runs in the sandbox

    def _again(self, snapshot: Snapshot, records: list[Any], *, engine: bool = False, read: Any = None) -> Probe:
        """Run the step on records, and put the state back: several runs share one sandbox."""
        try:
            return self._run(records, engine=engine, read=read)
        finally:
            snapshot.put_back()

    def _run(self, records: list[Any], *, engine: bool, read: Any = None) -> Probe:
        """Run the step on records within a sandbox that is entered already."""
        step, probe = self._step, Probe(self._step, engine=engine, read=read)
        with probe.attached(), step.microbatch(len(records)) if engine else ExitStack():
            output = self._host.run(records)
            if step.automatic:
                loss = self._host.loss_of(output, len(records))
                if loss is not None and loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                if engine:
                    step.engine.check_tracked()
                probe.collect(0)
        return probe

    # ---------------------------------------------------------------- are samples independent?

    def _check_state(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Check that what a step leaves behind does not depend on the records."""

        def run(batches: list[list[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
            state: dict[str, Any] = {}
            try:
                for number, batch in enumerate(batches):
                    seed_generators(0)
                    with FrozenRandomness():
                        probe = self._run(batch, engine=False)
                    if number == 0:
                        state = state_check.saved_state(self._step.module, self._host.others())
            finally:
                snapshot.put_back()
            return state, probe.private

        three = (records * 3)[:3] if len(records) < 3 else records[:3]
        state_check.check_state(run, three, together=not self._step.settings.runs_samples_alone)

    def _check_alone(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Compare the per-sample gradients of a batch with those of its samples run alone."""
        for coin in (MIDDLE, LOW, HIGH):
            try:
                self._compare_alone(snapshot, records, coin)
                return
            except PrivacyError as error:
                if "a finite gradient" not in str(error) or coin == HIGH:
                    raise

    def _compare_alone(self, snapshot: Snapshot, records: list[Any], coin: float) -> None:
        def run(chosen: list[Any], *, engine: bool) -> Probe:
            seed_generators(1)
            with FrozenRandomness(coin=coin):
                return self._again(snapshot, chosen, engine=engine)

        scale = len(records) if self._step.settings.loss_reduction == "mean" else 1
        batched = run(records, engine=True).private
        dtypes = {gradient.dtype for gradient in batched.values()}
        tolerance = TOLERANCE[torch.float64 if dtypes == {torch.float64} else self._host.narrow]
        alone = (run([record], engine=False).private for record in records)
        compare_with_singles(batched, alone, scale=scale, rtol=tolerance, module=self._step.module)

    def _check_exchange(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Exchange one sample of a batch in several ways; see ``exchange``."""
        few, spare = records[:NUM_SMALL], records[-1]
        if len(records) <= NUM_SMALL:
            few = records[:-1]
        if not few:
            return
        last = len(few) - 1
        middle, swapped = len(few) // 2, list(few)
        swapped[middle] = spare
        by_place = FrozenRandomness(by_place=True)
        base = self._fingerprint(snapshot, few, middle, by_place)
        self._compare(snapshot, base, swapped, middle, by_place, "exchanged for another record")
        for value, what in ((float("nan"), "made NaN"), (1e6, "made huge")):
            if exchange.has_floats(few[middle]):
                swapped[middle] = exchange.spoiled(few[middle], value)
                self._compare(snapshot, base, swapped, middle, by_place, what, may_raise=True)
        if last > 0:
            base = self._fingerprint(snapshot, few, last, by_place)
            self._compare(snapshot, base, few[:last], last, by_place, "left out", loose=True)
        swapped[middle] = spare
        for coin in (LOW, HIGH):
            mode = FrozenRandomness(coin=coin)
            base = self._fingerprint(snapshot, few, middle, mode, coin=coin)
            self._compare(snapshot, base, swapped, middle, mode, "exchanged for another record", coin=coin)
        self._exchange_one(snapshot, self._real_records(0), seed=0, spoil=True)

    def _exchange_one(self, snapshot: Snapshot, records: list[Any], *, seed: int, spoil: bool = False) -> None:
        """Exchange one sample of a batch of the real size, with real draws."""
        batch, spares = records[: self._host.batch_size], records[self._host.batch_size :]
        if len(batch) < 2 or not spares:
            return
        place, swapped = 0, list(batch)  # the first one: what counts or ranks samples passes it to the others
        base = self._fingerprint(snapshot, batch, place, None, seed=seed)
        for spare in exchange.most_different(batch[place], spares):
            swapped[place] = spare
            self._compare(snapshot, base, swapped, place, None, "exchanged for another record", seed=seed)
        if spoil and exchange.has_floats(batch[place]):
            swapped[place] = exchange.spoiled(batch[place], 1e6)
            self._compare(snapshot, base, swapped, place, None, "made huge", seed=seed, may_raise=True)

    def _compare(
        self,
        snapshot: Snapshot,
        base: exchange.Fingerprint,
        records: list[Any],
        place: int,
        mode: FrozenRandomness | None,
        what: str,
        *,
        loose: bool = False,
        may_raise: bool = False,
        **draws: Any,
    ) -> None:
        try:
            other = self._fingerprint(snapshot, records, place, mode, **draws)
        except PrivacyError:
            raise
        except Exception:
            if may_raise:  # the user's code refuses such a record: an exception, which the guarantee does not cover
                return
            raise
        narrow = torch.float64 if base.norms.dtype == torch.float64 else self._host.narrow
        stays = torch.arange(base.norms.shape[1], device=base.norms.device) != place
        exact, rough = exchange.TOLERANCE[narrow]
        same_shape = exchange.same_shapes(base, other) and not loose
        exchange.compare(base, other, stays, tolerance=exact if same_shape else rough, what=what)

    def _fingerprint(
        self,
        snapshot: Snapshot,
        records: list[Any],
        place: int,
        mode: FrozenRandomness | None,
        *,
        seed: int = 0,
        coin: float = MIDDLE,
    ) -> exchange.Fingerprint:
        """Run the engine on records and return what their gradients look like without the one at ``place``."""
        step, size = self._step, len(records)
        weights = exchange.random_weights(size, place)
        parameters: dict[str, Tensor] = dict(step.module.named_parameters())

        def read(names: list[str]) -> Any:
            return exchange.fingerprint(step.engine, names, weights, parameters)

        seed_generators(seed)
        if coin != MIDDLE:
            seed_low_or_high(high=coin > MIDDLE)
        with ExitStack() if mode is None else mode:
            probe = self._again(snapshot, records, engine=True, read=read)
        scale = size if step.settings.loss_reduction == "mean" else 1
        return exchange.join(probe.found, scale, exchange.sizes_of(records), frozenset(probe.stepped), size, place)

    def check_public(self) -> None:
        """Check that a public optimizer's gradient changes neither with the batch nor with how many samples it holds.

        Optimizers that did not step on this trial stay unchecked; their first real step is refused until one has.

        Raises:
            PrivacyError: the gradient changes.
        """
        records = self._host.records(NUM_ALONE)
        found: list[Probe] = []
        for chosen in (records[:1], records[1:2], records):
            with self._sandbox.enter():
                seed_generators(0)
                with FrozenRandomness(by_place=True):
                    found.append(self._run(chosen * 2 if len(chosen) == 1 else chosen, engine=False))
        positions = self._step.settings.public_optimizers
        for other, what in (
            (found[1], "which samples are in the batch"),
            (found[2], "how many samples the batch holds"),
        ):
            for name, gradient in found[0].public.items():
                bound = 1e-5 * (1e-8 + float(gradient.abs().max()))
                if name not in other.public or float((gradient - other.public[name]).abs().max()) > bound:
                    raise PrivacyError(
                        f"Expected the gradients of public_optimizers={positions!r} to be free of the data, got one for {name!r} "
                        f"that changes with {what}. Leave the optimizer out of public_optimizers, or keep data and batch size "
                        "out of its loss (a generator draws a fixed number of fakes for its own step)."
                    )
        self._step.unchecked_public -= found[0].stepped

    def check_skip(self) -> None:
        """Check, where ``training_step`` gave no loss for a batch, that it gives none for single samples either.

        Raises:
            PrivacyError: it does, so whether a sample counts depends on the samples around it.
        """
        for record in self._host.records(3):
            with self._sandbox.enter():
                seed_generators(0)
                if self._host.run([record]) is not None:
                    raise PrivacyError(
                        "Expected training_step to return None for every sample or for none, got None for a batch and a loss for "
                        "one sample alone. One sample could switch off all others: return the loss (a sample that is not finite "
                        "contributes zero anyway), or use microbatch_size=1."
                    )

    def check_steps(self, real: set[int], counts: Any) -> None:
        """Check, where some private optimizer did not step on a batch, that it does not step on single samples either.

        Args:
            real: private optimizers that stepped.
            counts: context manager that gives public counters the values of before the batch.

        Raises:
            PrivacyError: others step there, so whether noise is released depends on the samples.
        """
        private = self._step.accumulators.keys()
        for record in self._host.records(3):
            with self._sandbox.enter(), counts():
                seed_generators(0)
                stepped = self._run([record], engine=False).stepped & private
            if stepped != real:
                raise PrivacyError(
                    f"Expected private optimizers to step whatever the samples are, got steps of {sorted(real)} on a batch and of "
                    f"{sorted(stepped)} on one sample alone. One sample could switch off all others: let batch_idx or a count "
                    "decide when to step (a sample that is not finite contributes zero anyway)."
                )


def _different(records: list[Any]) -> list[Any]:
    """Return the records in an order that begins with different lengths and counts."""
    seen: set[Any] = set()
    first: list[Any] = []
    rest: list[Any] = []
    for record in records:
        shape = exchange.shape_of(record)
        (rest if shape in seen else first).append(record)
        seen.add(shape)
    return first + rest
