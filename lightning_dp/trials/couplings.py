"""Couplings: checks that no sample's gradient depends on another sample."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.custom import wrong_rules
from lightning_dp.per_sample.independence import compare_with_singles
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.trials import chosen_records, exchange, made_records
from lightning_dp.trials.draws import HIGH, LOW, MIDDLE, Draws
from lightning_dp.trials.exchanged import Exchanged
from lightning_dp.trials.probe import Probe
from lightning_dp.trials.runs import TrialRuns

#: Records of the comparison with single runs, and of the small batches of the exchange test.
NUM_ALONE, NUM_SMALL = 3, 4
#: Records among which one is chosen that is exchanged for another one: the one with the rarest whole numbers.
NUM_SPARES = 32
#: Relative tolerance of the comparison with single runs, by the narrowest type that takes part.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
#: Values of a record's numbers that hardly any record has, and that may switch something for the whole batch.
_SPOILED = {float("nan"): "made NaN", 1e6: "made huge", -1e6: "made huge and negative", 0.0: "made zero"}


class Couplings:
    """A set of checks that samples are independent, by sandbox runs on records from all over the training set.

    Args:
        runs: object that runs the user's step on trial.
    """

    def __init__(self, runs: TrialRuns) -> None:
        self._runs = runs

    def real_records(self, seed: int) -> list[Any]:
        """Return enough training records for a batch of a real size and for the exchanges."""
        host = self._runs.host
        return host.records(host.drawn_size(seed) + NUM_SPARES, seed=seed)  # type: ignore[no-any-return]

    def check_alone(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Check that the per-sample gradients of a batch equal the gradients of its samples run alone."""
        records, alone = chosen_records.differing(records)[:NUM_ALONE], self._runs.step.reduction.world_size == 1
        exchange.repeat_if_small(partial(self._compare_at_coins, snapshot, records), repeats=alone)

    def _compare_at_coins(self, snapshot: Snapshot, records: list[Any], moved: int) -> None:
        for coin in (MIDDLE, LOW, HIGH, None):
            if coin is None:  # code may divide by the range of a draw
                self._runs.host.by_column = True
            try:
                self._compare_alone(snapshot, records, Draws(seed=1, coin=coin or MIDDLE, moved=moved))
                return
            except PrivacyError as error:
                if "a finite gradient" not in str(error) or coin is None:
                    raise

    def _compare_alone(self, snapshot: Snapshot, records: list[Any], draws: Draws) -> None:
        def run(chosen: list[Any], *, engine: bool) -> Probe:
            return self._runs.again(snapshot, chosen, draws, engine=engine)

        step, scale = self._runs.step, self._runs.scale(len(records))
        with self._runs.loss_form.shown.comparing():
            batched = run(records, engine=True).private
        batched = self._runs.host.training.order.by_record(records, batched)
        tolerance = TOLERANCE[self._runs.coarsest(gradient.dtype for gradient in batched.values())]
        adds_up = None if step.settings.per_sample_loss else lambda: bool(self.adds_up(snapshot, records, draws))
        compare = partial(
            compare_with_singles, batched, scale=scale, rtol=tolerance, module=step.module, total=step.reduction.total
        )
        singles = (run([record], engine=False).private for record in records)
        try:
            compare(singles, adds_up=adds_up)  # which runs the loss of the batch
        except PrivacyError as error:
            if (wrong := wrong_rules(str(error))) and not isinstance(error, ComparisonError):
                raise ValueError(
                    f"Expected the registered rules for {', '.join(wrong)} to return the gradient of each row, got "
                    f"another one. Test a rule by lightning_dp.per_sample.check_rule. {error}"
                ) from error
            if not step.reduction.any(self._runs.draws_on_host):
                raise
            # a record alone gets the draws of the first one: look at it in its place, among copies of itself
            own = [{name: rows[i] * scale for name, rows in batched.items()} for i in range(len(records))]
            whole = {name: gradient * scale for name, gradient in run(records, engine=False).private.items()}
            if not exchange.add_up(own, whole, tolerance, step.reduction.total):
                raise
            among = (run([record] * len(records), engine=True).private for record in records)
            compare({name: rows[i] * scale for name, rows in one.items()} for i, one in enumerate(among))

    def adds_up(
        self, snapshot: Snapshot, records: list[Any], draws: Draws, scales: tuple[float, ...] = ()
    ) -> bool | None:
        """Tell whether the gradient of a batch is the sum of its records' gradients alone; None if all are zero.

        Args:
            snapshot: of the state before the runs.
            records: of the batch.
            draws: of all runs.
            scales: factors from the gradient of the batch to that sum, of which one has to fit; default: the run's.
        """
        whole, *parts = (
            self._runs.again(snapshot, chosen, draws).private for chosen in (records, *([record] for record in records))
        )
        total = self._runs.step.reduction.total
        tolerance = TOLERANCE[self._runs.coarsest(gradient.dtype for gradient in whole.values())]
        found = [
            exchange.add_up(parts, {name: gradient * scale for name, gradient in whole.items()}, tolerance, total)
            for scale in scales or (self._runs.scale(len(records)),)
        ]
        return None if None in found else any(found)

    def check_exchange(self, snapshot: Snapshot, records: list[Any]) -> None:
        """Check that no gradient changes if another sample of the batch is exchanged, in several ways."""
        few, spare = records[: min(NUM_SMALL, len(records) - 1)], records[-1]
        if not few:
            return
        last, middle, swapped = len(few) - 1, len(few) // 2, list(few)
        swapped[middle] = spare
        by_place = Draws(by_place=True)
        base = self._fingerprint(snapshot, few, middle, by_place)
        self._compare(snapshot, base, swapped, middle, by_place, "exchanged for another record")
        for value, what in _SPOILED.items():
            if made_records.has_floats(few[middle]):
                swapped[middle] = made_records.spoiled(few[middle], value)
                self._compare(snapshot, base, swapped, middle, by_place, what, may_raise=True)
        if last + 1 > self._runs.host.copies:
            self._compare_left_out(snapshot, few)
            self._exchange_beside_incomplete(snapshot, few, spare, by_place)
        swapped[middle] = spare
        for coin in (LOW, HIGH) if self._runs.has_coins else ():
            draws = Draws(coin=coin)
            base = self._fingerprint(snapshot, few, middle, draws)
            self._compare(snapshot, base, swapped, middle, draws, "exchanged for another record")
        self.exchange_one(snapshot, self.real_records(0), seed=0)
        self._exchange_far_away(snapshot, few, spare, middle)

    def _exchange_far_away(self, snapshot: Snapshot, few: list[Any], spare: Any, place: int) -> None:
        """Exchange a sample under other weights: a coupling may be smaller than rounding where training starts."""
        draws, swapped = Draws(by_place=True, far=True), list(few)
        same = chosen_records.shape_of(spare) == chosen_records.shape_of(few[place])
        swapped[place] = spare if same else made_records.of_one_row(few[place], spare)
        if swapped[place] is None or self._runs.step.reduction.is_sharded:  # ranks could not go on after an exception
            return
        try:
            base = self._fingerprint(snapshot, few, place, draws)
            self._compare(snapshot, base, swapped, place, draws, "exchanged for another record, under other weights")
        except ComparisonError:
            raise
        except Exception:  # such weights need not be possible
            return

    def _compare_left_out(self, snapshot: Snapshot, few: list[Any]) -> None:
        """Compare batches of two sizes; copies of all samples one after the other (``x.repeat(2, 1)``) may differ."""
        last, repeats = len(few) - 1, not self._runs.step.reduction.is_sharded

        def compare(moved: int, *, by_copy: bool = False) -> None:
            draws = Draws(by_place=True, by_copy=by_copy, moved=moved)
            base = self._fingerprint(snapshot, few, last, draws)
            self._compare(snapshot, base, few[:last], last, draws, "left out", loose=True)

        try:
            exchange.repeat_if_small(compare, repeats=repeats)
        except ComparisonError:
            again = partial(exchange.repeat_if_small, partial(compare, by_copy=True), repeats=repeats)
            if not (repeats and exchange.agrees(again)):
                raise

    def _exchange_beside_incomplete(self, snapshot: Snapshot, few: list[Any], spare: Any, draws: Draws) -> None:
        """Exchange the first sample next to records that user code may fill up from the others."""
        groups = made_records.incomplete(few[1], len(few) - 1)
        while groups:
            group = groups.pop()
            beside = [*(make(record) for make, record in zip(group, few[1:], strict=False)), *few[1 + len(group) :]]
            try:
                base = self._fingerprint(snapshot, [few[0], *beside], 0, draws)
            except PrivacyError:
                raise
            except Exception:  # the user's code refuses one of them
                if len(group) > 1 and self._runs.step.reduction.world_size == 1:
                    groups += [[make] for make in group]
                continue
            self._compare(snapshot, base, [spare, *beside], 0, draws, "exchanged next to one with missing values")

    def exchange_one(self, snapshot: Snapshot, records: list[Any], *, seed: int, size: int = 0) -> None:
        """Check that no gradient changes if one other sample is exchanged, at a real batch size and with real draws."""
        size = size or self._runs.host.drawn_size(seed)
        batch, spares = records[:size], records[size:]
        if len(batch) < 2 or not spares:
            return
        place, swapped = 0, list(batch)  # the first one: counting or ranking code passes it to the others
        draws = Draws(seed=seed, real=True)
        base = self._fingerprint(snapshot, batch, place, draws)
        chosen, shape = chosen_records.most_different(batch[place], spares), chosen_records.shape_of(batch[place])
        for spare in chosen:
            swapped[place] = spare
            self._compare(snapshot, base, swapped, place, draws, "exchanged for another record")
        # real draws need a record of the same shape
        if all(chosen_records.shape_of(spare) != shape for spare in chosen):
            swapped[place] = made_records.of_one_row(batch[place], chosen[0])
            if swapped[place] is not None:
                self._compare(snapshot, base, swapped, place, draws, "given one row in all places", may_raise=True)
        for value in (1e6, -1e6) if made_records.has_floats(batch[place]) else ():  # what a maximum shows
            swapped[place] = made_records.spoiled(batch[place], value)
            self._compare(snapshot, base, swapped, place, draws, _SPOILED[value], may_raise=True)

    def exchange_collated(self, snapshot: Snapshot, found: Exchanged, *, seed: int) -> None:
        """Check that no gradient of a batch changes if another record is exchanged before the batch is collated."""
        draws = Draws(seed=seed, real=True)
        real, other = found.collated()
        base = self._fingerprint(snapshot, real, found.place, draws)
        self._compare(snapshot, base, other, found.place, draws, "exchanged for another record")

    def _compare(
        self,
        snapshot: Snapshot,
        base: exchange.Fingerprint,
        records: list[Any],
        place: int,
        draws: Draws,
        what: str,
        *,
        loose: bool = False,
        may_raise: bool = False,
    ) -> None:
        try:
            other = self._fingerprint(snapshot, records, place, draws)
        except PrivacyError:
            raise
        except Exception:
            if may_raise:  # the user's code refuses such a record: an exception, which the guarantee does not cover
                return
            raise
        exchange.check_seeds(base, other, draws, what)
        stays = torch.arange(base.norms.shape[1], device=base.norms.device) != place
        exact, rough = exchange.TOLERANCE[self._runs.coarsest([base.norms.dtype])]
        same_shape, total = base.shapes == other.shapes and not loose, self._runs.step.reduction.total
        tolerance = exact if same_shape else rough

        def check(one: exchange.Fingerprint, two: exchange.Fingerprint, allowed: float = tolerance) -> None:
            exchange.compare(one, two, stays, tolerance=allowed, what=what, total=total)

        def check_in_equal_draws() -> None:
            assert base.again is not None
            for coin in (MIDDLE, LOW, HIGH) if self._runs.has_coins else (MIDDLE,):
                same = Draws(seed=draws.seed, coin=coin, far=draws.far, rates=True)
                options = {"loose": loose, "may_raise": may_raise}
                self._compare(snapshot, base.again(same), records, place, same, what, **options)

        try:
            check(base, other)
        except ComparisonError as error:
            reduction = self._runs.step.reduction
            differ_by_row = (draws.real or draws.by_place) and base.again is not None
            if differ_by_row and not loose and (base.shapes, base.drawn) != (other.shapes, other.drawn):
                check_in_equal_draws()  # the others may have got other draws
                return
            if draws.real and not draws.by_content and base.again is not None:
                # rows in an order that depends on the records, as by their lengths, have passed on masks of dropout
                by_content = replace(draws, by_content=True)
                self._compare(snapshot, base.again(by_content), records, place, by_content, what, may_raise=may_raise)
                return
            if same_shape and not reduction.is_sharded and exchange.is_rounding(base, other, draws, check, rough):
                return
            if differ_by_row and reduction.world_size == 1 and exchange.agrees(check_in_equal_draws):
                raise exchange.only_by_draws(what) from error
            raise

    def _fingerprint(self, snapshot: Snapshot, records: list[Any], place: int, draws: Draws) -> exchange.Fingerprint:
        """Run the engine on records and return their fingerprint; its weighted sums leave out the sample at
        ``place``.
        """
        step, size = self._runs.step, len(records)
        order = self._runs.host.training.order.rows_of(records)
        weights = exchange.random_weights(size, place, order)
        known: dict[str, Tensor] = dict(step.module.named_parameters())

        def read(names: list[str]) -> Any:
            return exchange.fingerprint(step.reduction, step.engine, weights, {name: known[name] for name in names})

        probe = self._runs.again(snapshot, records, draws, engine=True, read=read)
        found = exchange.join(probe.found, records, self._runs.scale(size), tuple(probe.stepped), order)
        found.drawn, found.seeds = probe.drawn, probe.seeds
        found.again = partial(self._fingerprint, snapshot, copy.copy(records), place)
        return found
