"""Learn to which sample each row belongs: by its position, or by an index that is followed through the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import HIDDEN, WAY_OUT
from lightning_dp.per_sample.owners.batch_owners import BatchOwners
from lightning_dp.per_sample.tracking.plans import Learner
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.system.torch_private import Layers

if TYPE_CHECKING:
    from lightning_dp.per_sample.base import GradientEngine

Run = Callable[[int], object]
"""Executes the user's forward on that many samples."""


class Rows:
    """Knowledge of the rows that private parameters meet; see ``GradientEngine.learn_layout``.

    Args:
        module: the user's.
        tracker: follows its parameters.
        engine: begins and ends microbatches.
        layers: of the module.
    """

    def __init__(self, module: nn.Module, tracker: Tracker, engine: GradientEngine, layers: Layers) -> None:
        self._module, self._tracker, self._engine, self._layers = module, tracker, engine, layers
        self._owners = BatchOwners(module)
        self._learning_size: int | None = None
        self.follows_owners = False
        """Whether rows belong to samples by an index that is followed through the step, not by their positions."""
        self._may_follow = False  # owners could be followed as well, and name the samples that positions name
        self._prefers_owners = False

    @property
    def are_known(self) -> bool:
        """True if every use of every parameter is understood, or its rows are followed."""
        learned = self._tracker.learned
        return self.follows_owners or (learned is not None and self._tracker.parameters.keys() <= learned.names)

    def follows(self, size: int, joined: frozenset[int | tuple[int, ...]]) -> bool:
        """Tell whether owners are followed through a batch: always, or where positions may mislead.

        Args:
            size: number of samples.
            joined: see ``GradientEngine``.
        """
        misleads = size > 1 and any(isinstance(one, int) and one % size == 0 for one in joined)
        return self.follows_owners or (misleads and self._may_follow)

    def prefer_owners(self) -> bool:
        """Follow owners when the layout is learned again, because positions misled; return False if that is not new."""
        is_new = not (self._prefers_owners or self.follows_owners)
        self._prefers_owners = True
        return is_new

    def see(self, batch: Any) -> None:
        """Take note of the batch that the user's step is about to run on."""
        if self._learning_size is not None:
            self._owners.learn(batch, self._learning_size)
        elif self._tracker.follower is not None:
            self._tracker.follower.forget()  # what is done before the step is followed on trial only
            for tensor in self._layers.now().tensors():
                self._tracker.follower.note(tensor, None)
            self._owners.note(batch, self._tracker.follower)

    def learn(self, run: Run, sizes: tuple[int, int], *, more: bool, alike: bool) -> None:
        """Learn from runs at two sizes.

        Raises:
            PrivacyError: rows cannot be given to samples, neither by position nor by owners.
        """
        if not more:
            self.follows_owners = self._may_follow = False
            self._owners.forget()
            self._tracker.repeats.clear()
        grads = {parameter: parameter.grad for parameter in self._module.parameters()}
        try:
            with torch.enable_grad():
                if self._prefers_owners and not more:
                    self._learn_owners(run, sizes)
                elif more and self.follows_owners:
                    self._try_owners(run, sizes)
                else:
                    self._learn_positions(run, sizes, more=more, alike=alike)
        finally:
            self._learning_size = None
            for parameter, grad in grads.items():
                parameter.grad = grad

    def _learn_positions(self, run: Run, sizes: tuple[int, int], *, more: bool, alike: bool) -> None:
        def run_of(size: int) -> None:
            self._learning_size = size
            run(size)

        try:
            learned = Learner(self._tracker, run_of, sizes).learn(set(self._tracker.parameters))
        except PrivacyError as error:
            if more:  # the result of these runs is unclear: such uses are refused later
                return
            try:
                self._learn_owners(run, sizes)
            except PrivacyError as second:
                # samples that meet each other are others one by one, and an index does not help within a transform
                if WAY_OUT not in str(error) or HIDDEN in str(error):
                    raise error from second
                raise PrivacyError(f"{error} Nor can rows be followed to their samples: {second}") from error
        else:
            before = self._tracker.learned
            self._tracker.learned = before.joined(learned) if more and before is not None else learned
            self._settle(run, sizes, alike=alike, more=more)

    def _learn_owners(self, run: Callable[[int], object], sizes: tuple[int, int]) -> None:
        """Learn where batches hold the owners of rows, and follow them."""
        for size in sizes:
            if (self._owners.was_seen or self._prefers_owners) and not self._owners.has_learned(size):
                self._learning_size = size
                try:
                    run(size)
                except PrivacyError:  # rows must be followed to their samples, maybe, as below
                    if not self._owners.has_learned(size):
                        raise
        self._learning_size, self._tracker.learned = None, None
        self._try_owners(run, sizes)

    def _try_owners(self, run: Callable[[int], object], sizes: tuple[int, int]) -> None:
        """Run the user's forward and follow the owners of rows, because positions do not determine them."""
        self.follows_owners = self._tracker.repeats.learns = True
        try:
            for size in sizes:
                self._engine.begin(size)
                run(size)
                self._engine.end()
        except BaseException:
            self.follows_owners = False
            self._engine.end()
            raise
        finally:
            self._tracker.repeats.learns = False

    def _settle(self, run: Callable[[int], object], sizes: tuple[int, int], *, alike: bool, more: bool) -> None:
        """Check that each sample has K rows in the learned order whatever the data are; else follow the owners."""
        learned, tracker, reason, self._may_follow = self._tracker.learned, self._tracker, "", False
        assert learned is not None
        if self._owners.was_seen:
            self._learning_size = None
            tracker.begin_comparison()
            try:
                self._try_owners(run, sizes)
            except PrivacyError as error:
                reason = f" Nor can rows be followed to their samples: {error}"
                if tracker.contradicted is not None:
                    tracker.learned = None
                    raise PrivacyError(
                        f"Expected the rows of {tracker.contradicted} in the order of the samples, got them in another "
                        f"one, such as one of the data.{reason}"
                    ) from error
                if tracker.chooses_rows:
                    tracker.learned = None
                    raise PrivacyError(
                        "Expected equally many rows of each sample whatever the data are, got rows that data choose, "
                        f"of which other records may have more or fewer.{reason}"
                    ) from error
                if alike:  # such records do not show whether K is common: it stays as it is
                    learned.pin()
            else:
                misplaced = learned.has_folds and (tracker.num_misplaced > 0 or self._owners.has_indices)
                self.follows_owners = tracker.chooses_rows or tracker.contradicted is not None or misplaced
                self._may_follow = not tracker.owns_by_position
                if self.follows_owners and tracker.owns_by_position:
                    tracker.compares, tracker.learned = False, None
                    self._try_owners(run, sizes)  # which refuses these rows, since positions do not name their owners
            finally:
                tracker.compares = False
        unordered = learned.close()
        if unordered is not None and not self.follows_owners and not more:
            tracker.learned = None
            label, doubt = unordered
            raise PrivacyError(
                f"Expected to see which samples {label} works on, but {doubt.reason}. {doubt.way_out}{reason}"
            )
