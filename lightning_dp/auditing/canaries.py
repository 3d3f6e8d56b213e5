"""Canaries in gradient space: public gradients that join every noisy sum, and the scores of their traces.

Legend: ``m`` canaries, ``G`` groups of parameters, ``P`` private coordinates, ``S`` sensitivity of the clipped sum.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Hashable
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dp import _validate as check
from lightning_dp.clipping import Clipping, FactorClipping
from lightning_dp.clipping.bounds import Bound
from lightning_dp.errors import PrivacyError

_NOISELESS = 1e-3  # noise, in units of S, below which likelihood ratios are decisive anyway


class Sum(Protocol):
    """An accumulator: the buffer in which the clipped gradients of a logical batch add up."""

    groups: list[list[str]]
    names: list[str]
    clipping: Clipping
    active: Tensor | None
    num_coordinates: int

    @property
    def gradient(self) -> Tensor:
        """Sum so far, over the active coordinates."""

    def add_at(self, positions: Tensor, values: Tensor) -> None:
        """Add values at positions (below P) of the gradient; masked positions are left out."""

    @property
    def statistics(self) -> Tensor:
        """Sums of the clipping statistics so far."""

    @property
    def sensitivity(self) -> float:
        """Largest norm of one sample's contribution."""

    def read(self, noisy: Tensor, positions: Tensor) -> Tensor:
        """Return the entries of a release at positions of the gradient; masked positions give 0."""

    def views_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Return one view per parameter of a buffer of shape (P,)."""


class Canaries:
    """Additional public records in every logical batch. This base class has none and means "off".

    **Guarantee**: canaries are chosen without the data, and are sampled, clipped and added as records are. So a real
    record moves the sum by at most S, as without canaries, and noise, divisor and ledger are unchanged: epsilon holds
    for every real record, even for an adversary who knows the canaries.
    """

    needs_factors: ClassVar[bool] = False
    """True if the clipping must scale gradients by factors."""
    reads_sums: ClassVar[bool] = False
    """True if canaries join sums and read releases, so that no sum may be stored as a mean."""

    def begin(self, sample_rate: float | None) -> None:
        """Draw the canaries of the logical batch that begins."""

    def join(self, key: Hashable, sums: Sum, bound: Bound, *, adds: bool) -> None:
        """Add the canaries of this batch to a sum that is about to be noised."""

    def observe(self, key: Hashable, sums: Sum, noisy: Tensor, noise_std: float) -> None:
        """Update the score of each canary from a release."""


class GradientCanaries(Canaries):
    """m canaries with long gradients in separate coordinates; a fair coin includes each of them.

        g_j = +-norm S e_{k(j, 1)} ... +-norm S e_{k(j, G)}      one coordinate per group, no two canaries share one
        score_j = sum_t ln(1 - q_t + q_t exp(L_tj)),     L_tj = (<G~_t, u_tj> - |u_tj|^2 / 2) / std_t^2

    with u_tj the canary's clipped gradient and G~_t the noisy sum. The score is the log likelihood ratio of "in" over
    "out" for an adversary who sees every noisy gradient. A canary's clipped gradient is the largest possible one.

    **Guarantee**: see ``Canaries``. Coins, coordinates and scores are public. Scores are computed from coins,
    coordinates and releases alone, so publishing them costs no privacy.

    Args:
        num_canaries: m >= 1.
        norm: length of a canary's gradient before clipping, in units of S; above 1 so that clipping has an effect.
        root: hexadecimal digits that determine coins and coordinates; fresh from the operating system by default.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> canaries = GradientCanaries(100)
        >>> canaries.included.dtype, canaries.scores.shape
        (dtype('bool'), (100,))

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run, section 6 (Dirac canaries).
        Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning, section 5.
    """

    needs_factors = True
    reads_sums = True

    def __init__(self, num_canaries: int, *, norm: float = 10.0, root: str | None = None) -> None:
        self._begin(num_canaries, norm, secrets.token_hex(32) if root is None else root)

    def _begin(self, num_canaries: int, norm: float, root: str) -> None:
        self.num_canaries = check.check_count("num_canaries", num_canaries)
        self.norm = check.check_positive("norm", norm)
        self.root = root
        self._rng = np.random.default_rng([int(self.root, 16), 1])
        self._members_rng = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))
        self.included = coins(num_canaries, self.root)
        self.signs = torch.from_numpy(np.where(self._rng.random(num_canaries) < 0.5, -1.0, 1.0))
        self._places: dict[Hashable, _Places] = {}
        self._members = torch.zeros(num_canaries, dtype=torch.bool)
        self._contributions: dict[Hashable, Tensor] = {}
        self._folded = np.zeros(num_canaries)
        self._pending = np.zeros(num_canaries)
        self._sample_rate = 1.0

    @property
    def scores(self) -> NDArray[np.float64]:
        """Log likelihood ratio of "in" against "out" over all releases so far, shape (m,). Public."""
        self._fold()
        return self._folded.copy()

    def place(self, key: Hashable, sums: Sum) -> None:
        """Choose the canaries' coordinates in one sum, unless chosen already, in every group that has enough.

        Raises:
            ValueError: no group has an active coordinate for each canary.
        """
        known = self._places.get(key)
        if known is None or not known.fits(sums):
            self._places[key] = _Places(sums, self.num_canaries, self._rng)

    def begin(self, sample_rate: float | None) -> None:
        """Draw the canaries of the logical batch: each one whose coin says "in" joins with probability q.

        Args:
            sample_rate: q, as for a real record; None if batches are not Poisson samples.

        Raises:
            PrivacyError: batches are not Poisson samples.
        """
        if sample_rate is None:
            raise PrivacyError(
                "Expected sampling='poisson' with canaries in gradient space, got batches of another kind. They must "
                "be sampled as records are: pass sampling='poisson', or audit with input canaries."
            )
        self._fold()
        self._sample_rate = sample_rate
        drawn = self._members_rng.random(self.num_canaries) < sample_rate
        self._members = torch.from_numpy(self.included & drawn)

    def join(self, key: Hashable, sums: Sum, bound: Bound, *, adds: bool) -> None:
        """Clip the gradients of all canaries, and add the gradients of the canaries in this batch.

        Args:
            key: name of the sum.
            sums: accumulator to add to.
            bound: rule of the clipping bound; its statistics count the canaries too.
            adds: True in the one process that adds the gradients.
        """
        self.place(key, sums)
        assert isinstance(sums.clipping, FactorClipping), "refused when the run was settled"
        places, gradient = self._places[key], sums.gradient
        raw_GM = (self.norm * sums.sensitivity * self.signs).to(gradient).expand(len(sums.groups), -1)
        live_GM = places.present(sums.active)
        norms_GM = raw_GM.abs() * live_GM
        kept_GM = raw_GM * live_GM * sums.clipping.factors(norms_GM)
        self._contributions[key] = kept_GM
        members = self._members.to(gradient.device)
        if not adds or not bool(members.any()):
            return
        for group, positions in places.of.items():
            sums.add_at(positions[members], kept_GM[group, members])
        if bound.num_statistics:
            sums.statistics.add_(bound.statistics(torch.linalg.vector_norm(norms_GM[:, members], dim=0)))

    def observe(self, key: Hashable, sums: Sum, noisy: Tensor, noise_std: float) -> None:
        """Add the log likelihood ratio of a release to the score of each canary.

        Args:
            key: name of the sum.
            sums: the sum that was released.
            noisy: its active coordinates after noise, over all ranks.
            noise_std: claimed standard deviation of the noise on each coordinate.
        """
        kept_GM = self._contributions.pop(key)
        seen_M = torch.zeros(self.num_canaries, dtype=torch.float64, device=kept_GM.device)
        for group, positions in self._places[key].of.items():
            seen_M += sums.read(noisy, positions).double() * kept_GM[group]
        variance = max(noise_std, _NOISELESS * sums.sensitivity) ** 2
        self._pending += ((seen_M - kept_GM.double().square().sum(0) / 2) / variance).cpu().numpy()

    def _fold(self) -> None:
        """Add the last logical batch, whose releases all hold the same canaries, to the scores."""
        q = self._sample_rate
        with np.errstate(divide="ignore"):
            absent = math.log1p(-q) if q < 1 else -math.inf
            self._folded += np.logaddexp(absent, math.log(q) + self._pending)
        self._pending = np.zeros(self.num_canaries)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs; the canaries of later batches are drawn from fresh entropy."""
        return {"root": self.root, "num_canaries": self.num_canaries, "norm": self.norm, "scores": self.scores.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore coins and scores when a run resumes; coordinates are chosen again."""
        self._begin(state["num_canaries"], state["norm"], state["root"])
        self._folded = np.array(state["scores"], dtype=np.float64)


class _Places:
    """Coordinates of the canaries in one sum: disjoint positions of shape (m,) for each group."""

    def __init__(self, sums: Sum, num_canaries: int, rng: np.random.Generator) -> None:
        self._names, self._device, self._size = list(sums.names), sums.gradient.device, sums.num_coordinates
        self._num_groups, self._num_canaries = len(sums.groups), num_canaries
        index = sums.views_of(torch.arange(self._size, device=self._device))
        self.of: dict[int, Tensor] = {}
        largest = 0
        for group, names in enumerate(sums.groups):
            usable = torch.cat([index[name].reshape(-1) for name in names])
            if sums.active is not None:
                usable = usable[sums.active[usable]]
            largest = max(largest, usable.numel())
            if usable.numel() >= num_canaries:
                chosen = torch.from_numpy(rng.choice(usable.numel(), size=num_canaries, replace=False))
                self.of[group] = usable[chosen.to(self._device)]
        if not self.of:
            raise ValueError(
                f"Expected num_canaries of at most {largest}, the coordinates of the largest group of parameters, got "
                f"num_canaries={num_canaries}. Canaries must not share a coordinate: audit with fewer."
            )

    def fits(self, sums: Sum) -> bool:
        """Return whether a sum still has the parameters, size and device of these coordinates."""
        same: bool = self._names == sums.names and self._size == sums.num_coordinates
        return same and self._device == sums.gradient.device

    def present(self, live: Tensor | None) -> Tensor:
        """Return 1 if a canary has an active coordinate in a group, else 0; shape (G, m)."""
        present_GM = torch.zeros(self._num_groups, self._num_canaries, device=self._device)
        for group, positions in self.of.items():
            present_GM[group] = 1.0 if live is None else live[positions].float()
        return present_GM


def coins(num: int, root: str) -> NDArray[np.bool_]:
    """Return ``num`` fair coin flips that the hexadecimal digits ``root`` determine.

    Example:
        >>> coins(1000, "0a").sum() == coins(1000, "0a").sum()
        np.True_
    """
    flips: NDArray[np.bool_] = np.random.default_rng(int(root, 16)).random(num) < 0.5
    return flips
