"""Noise of a release: drawn before the sum where nothing has to see the sum without it, else added to it."""

from __future__ import annotations

from lightning_dp.noise import GaussianNoise, has_spare_core
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.release import Release


class ReleaseNoise:
    """The noise that a release states, drawn once per release.

    **Guarantee**: after :meth:`add` every coordinate and every statistic of the accumulator holds this rank's share of
    noise of exactly the release's standard deviations, whether it was drawn before or after the samples were added.

    Args:
        noise: source of the noise.
        reduction: says which share of the noise this rank adds.
    """

    def __init__(self, noise: GaussianNoise, reduction: Reduction) -> None:
        self.source, self._reduction = noise, reduction

    def begin(self, accumulator: Accumulator, release: Release, *, first: bool, divisor: int) -> None:
        """Initialise a buffer to which nothing was added yet, with the noise of its release where that may come first.

        Args:
            accumulator: of one private optimizer.
            release: settled when the logical batch began.
            first: whether the sum may begin with its noise, which saves one pass over the buffer.
            divisor: above 1, the gradient is held divided by it, noise included.
        """
        if accumulator.used:
            return
        accumulator.used = True
        if release.noise_std > 0 and first:
            accumulator.begin_with_noise(self.source, release.noise_std * self._reduction.noise_share, divisor)

    def add(self, accumulator: Accumulator, release: Release, *, alone: bool) -> None:
        """Add the noise that the accumulator lacks.

        Args:
            accumulator: of one private optimizer, with all samples added.
            release: the same object as in :meth:`begin`.
            alone: whether it is the only accumulator of a step, so that the next noise may be drawn during the next forward.
        """
        gradient, share = accumulator.gradient, self._reduction.noise_share
        if accumulator.noise_std is None:
            self.source.add_(gradient, release.noise_std * share)
        assert accumulator.noise_std in (None, release.noise_std * share), "the buffer began with other noise"
        if accumulator.num_statistics:
            self.source.add_(accumulator.statistics, release.statistics_std * share)
        if release.noise_std > 0 and alone and has_spare_core():
            self.source.prepare(gradient.numel(), gradient.dtype, gradient.device)
