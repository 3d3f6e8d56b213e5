"""Noise of a release: drawn before the sum, or added to the sum if the un-noised sum is needed."""

from __future__ import annotations

from lightning_dp.errors import PrivacyError
from lightning_dp.noise import CorrelatedGaussianNoise, GaussianNoise
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.correlation import Correlation
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release


class ReleaseNoise:
    """The noise of releases, drawn once per release.

    **Guarantee**: after :meth:`add` every coordinate and every statistic of the accumulator holds this rank's share of
    noise of exactly the release's standard deviations, whether it was drawn before or after the samples were added.

    Args:
        noise: source of independent noise.
        reduction: gives the share of the noise that this rank adds.
        seed: seed of correlated noise, for tests.
    """

    def __init__(self, noise: GaussianNoise, reduction: Reduction, seed: int | None = None) -> None:
        self.source, self._reduction, self._seed = noise, reduction, seed
        self._correlated: CorrelatedGaussianNoise | None = None
        self._began_at = 0

    @property
    def since(self) -> int:
        """Number of earlier steps in the current history of correlated noise."""
        return 0 if self._correlated is None else self._correlated.step

    @property
    def _drawn(self) -> GaussianNoise | CorrelatedGaussianNoise:
        return self.source if self._correlated is None else self._correlated

    def follow(self, correlation: Correlation | None, step: int) -> None:
        """Begin a logical step; each run and each resumption begins with an empty history of correlated noise.

        Args:
            correlation: of the plan.
            step: logical steps released so far.

        Raises:
            PrivacyError: an earlier step drew noise without a release.
        """
        if correlation is None:
            self._correlated = None
            return
        if self._correlated is None or step == 0:
            self._correlated = CorrelatedGaussianNoise(
                correlation.noise, steps=correlation.steps - step, seed=self._seed
            )
            self._began_at = step
        if self._began_at + self._correlated.step != step:
            raise PrivacyError(
                f"{self._correlated.step} draws of correlated noise belong to {step - self._began_at} steps, so noise "
                "would be cancelled in the wrong step. A step was given up after its noise was drawn: resume from a "
                "checkpoint."
            )

    def begin(self, accumulator: Accumulator, release: Release, *, first: bool, divisor: int) -> None:
        """Initialise an unused buffer with the noise of its release, if noise may come first.

        Args:
            accumulator: of one private optimizer.
            release: settled when the logical batch began.
            first: whether the sum may begin with its noise, which saves one pass over the buffer.
            divisor: if above 1, the gradient and its noise are stored divided by it.
        """
        if accumulator.used:
            return
        accumulator.used = True
        if release.drawn_std > 0 and first:
            share = self._reduction.noise_share
            accumulator.begin_with_noise(self._drawn, release.drawn_std, divisor, release.shares, share)

    def add(self, accumulator: Accumulator, release: Release) -> None:
        """Add the noise that the accumulator does not hold yet.

        Args:
            accumulator: of one private optimizer, with all samples added.
            release: the same object as in :meth:`begin`.
        """
        if accumulator.noise_std is None:
            for part, factor in accumulator.noise_parts(release.shares, self._reduction.noise_share):
                self._drawn.add_(part, release.drawn_std * factor)
        assert accumulator.noise_std in (None, release.drawn_std), "the buffer began with other noise"
        if accumulator.num_statistics:
            self.source.add_(accumulator.statistics, release.statistics_std * self._reduction.noise_share)
