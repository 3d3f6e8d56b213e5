"""RunFacts: the public facts of a private strategy, for users and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dp.sampling import PrivateDataLoader
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.facts import StateFacts
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.planning import build_plan
from lightning_dp.step.settings import Settings
from lightning_dp.step.settling import noise_stds
from lightning_dp.strategies.run_length import run_length

if TYPE_CHECKING:
    from lightning_dp.strategies.fit import PrivateFit


class RunFacts(StateFacts):
    """The public facts of a private strategy, for users and callbacks."""

    settings: Settings
    lightning_module: pl.LightningModule | None
    optimizers: list[Any]
    _loader: PrivateDataLoader | None
    _fit: PrivateFit | None

    @property
    def plan(self) -> DPPlan:
        """The public settings of the run, built with calibrated noise at the first access after data setup.

        Raises:
            ValueError: no run has been set up yet.
        """
        state = self.state
        if state.plan is None:
            if self._loader is None:
                raise ValueError(
                    "Expected a run with its training data set up, got none yet. Ask for the plan during or after fit."
                )
            length = run_length(self.trainer, self._loader.facts, start=state.steps_taken)
            state.plan = build_plan(state, self.settings, self._loader.facts, self.mechanisms, length)
            self.settle_limit()
        return state.plan  # type: ignore[no-any-return]

    @property
    def bytes_per_step(self) -> int:
        """Bytes that one rank passes to sums over ranks: per logical step, and per microbatch if sharded."""
        return sum(accumulator.payload_bytes for accumulator in self.accumulators.values())

    @property
    def accumulators(self) -> Mapping[int, Accumulator]:
        """The accumulators of the current fit, by index of their private optimizer; empty outside of fit."""
        return MappingProxyType({} if self._fit is None else self._fit.step.accumulators)

    @property
    def noise_std(self) -> Mapping[str, float]:
        """Noise std per active coordinate of the noisy mean, by parameter name; public. Empty outside of fit.

            sigma_t C / B, for every parameter unless clipping shares noise out between groups

        The mean is ``p.grad``, unless ``TopAgg`` or ``PublishedAutoThreshold`` scales it further. The values belong to
        the current logical step, so that an optimizer can distinguish signal from noise.
        """
        if self._fit is None:
            return {}
        step = self._fit.step
        return noise_stds(step.releases, step.accumulators, self.plan.expected_batch_size)

    @property
    def audits(self) -> list[str]:
        """Results of audits, one line each; the privacy statement names them."""
        return self.state.audits

    @property
    def nonprivate_logs(self) -> set[str]:
        """Names of figures of the training data that were logged without noise."""
        return self.state.nonprivate_logs

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all private optimizers by qualified name."""
        assert self._fit is not None
        private = (index for index in range(len(self.optimizers)) if index not in self.settings.public_optimizers)
        return {name: p for index in private for name, p in self._fit.step.parameters.of(index).items()}

    def losses(self, records: Sequence[Any], loss: Callable[[pl.LightningModule, Any], Tensor]) -> list[float]:
        """Return the loss of each record alone, in evaluation mode and without any effect. NOT private.

        Args:
            records: as the training set holds them.
            loss: (module, batch of one record on the device) -> loss.
        """
        assert self._fit is not None
        return self._fit.losses(records, loss)

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer that the module is attached to."""
        return self.module.trainer

    @property
    def module(self) -> pl.LightningModule:
        """The user's module."""
        module = self.lightning_module
        assert module is not None
        return module

    @property
    def is_on_trial(self) -> bool:
        """True while user code runs in the sandbox, which undoes its effects."""
        return self._fit is not None and self._fit.on_trial

    @property
    def loader(self) -> PrivateDataLoader:
        """The private loader of the training set."""
        assert self._loader is not None
        return self._loader
