"""TopAgg: each sample votes on its k largest coordinates.

Shapes: B samples, P private coordinates; ``K`` coordinates chosen, ``L`` active coordinates.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.clipping.base import ExplicitClipping, check_bound, check_groups
from lightning_dp.clipping.flat import FlatClipping
from lightning_dp.clipping.votes import coin_generator, largest_coordinates, threshold_votes, top_k_votes

_SIGNS = {"stochastic": "stochastic", "plain": "sign"}
_CHUNK = 1 << 22  # coordinates voted on at a time, which bounds the memory that choosing needs


@dataclass(frozen=True)
class TopAgg(ExplicitClipping):
    """Votes in place of gradients: +1 or -1 on the k largest coordinates of each sample's gradient.

        v_i[j] = +1 with probability 1/2 + g_i[j] / (2 max|g_i|), else -1, for j in K_i = top-k of |g_i|
        v_i[j] = 0 for all other j;   ||v_i|| = sqrt(k)
        gradient = S / (B sqrt(k)),   S = sum_i v_i + N(0, (sigma sqrt(k))^2 I)
        vote_threshold=beta:   gradient = u / sqrt(k),   u = sign(S) where |S| > beta B, else 0

    If all samples agree, u has the scale of S / B, so a learning rate keeps its meaning. With ``keep_values`` the k
    largest values are kept and clipped to R: u_i = min(1, R / ||top-k(g_i)||) top-k(g_i), gradient = S / B.

    **Guarantee**: see ``Clipping``; sensitivity sqrt(k) for any coins, R with ``keep_values``. A sample's vote has norm
    sqrt(k) if at least k active coordinates are not zero; with stochastic signs, if at least k are active and one is
    not zero. A gradient that is zero or not finite casts no vote. A sample's choice of coordinates is private, so all
    active coordinates need the noise. The top k of the un-noised sum of a batch would reveal the sum and is not
    offered; the vote threshold acts on the noisy sum. The coins come from the operating system's entropy, not from
    torch's generator, and no privacy rests on them.

    Args:
        k: an int >= 1 is a number of coordinates; a float in (0, 1] is a fraction of the private ones, so 1.0 is all of
            them and 1 is a single one.
        sign: "stochastic", or "plain" for sign(g_i[j]); not used with ``keep_values``.
        keep_values: whether values are kept in place of signs.
        vote_threshold: beta >= 0, as a fraction of the expected batch size; ``None``: no threshold.
        max_grad_norm: R, in [1e-30, 1e30]; used with ``keep_values`` only.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, or a vote threshold together with ``keep_values``.

    Example:
        >>> clipping = TopAgg(2, sign="plain")
        >>> clipping.contributions(torch.tensor([[0.1, -3.0, 2.0], [1.0, torch.nan, 2.0]])).tolist()
        [[0.0, -1.0, 1.0], [0.0, 0.0, 0.0]]
        >>> TopAgg(0.5).for_coordinates(18).sensitivity(1)
        3.0

    References:
        Wang et al. 2021, DataLens: Scalable Privacy Preserving Training via Gradient Compression and Aggregation, CCS,
        algorithms 2 and 3; here for the gradients of samples in place of teachers.
    """

    k: int | float
    _: KW_ONLY
    sign: str = "stochastic"
    keep_values: bool = False
    vote_threshold: float | None = None
    max_grad_norm: float = 1.0
    name: ClassVar[str] = "top_agg"

    def __post_init__(self) -> None:
        if isinstance(self.k, float):
            if not 0 < self.k <= 1:
                raise ValueError(
                    f"Expected a float k in (0, 1], got k={self.k}. It is a fraction; an int is a number of "
                    "coordinates."
                )
        else:
            check.check_count("k", self.k)
        check.check_choice("sign", self.sign, _SIGNS)
        check.check_flag("keep_values", self.keep_values)
        if self.vote_threshold is not None:
            check.check_nonnegative("vote_threshold", self.vote_threshold)
            if self.keep_values:
                raise ValueError(
                    f"Expected no vote threshold with keep_values=True, got vote_threshold={self.vote_threshold}. "
                    "Values are not votes: leave one of them out."
                )
        check_bound("max_grad_norm", self.max_grad_norm)

    @override
    def sensitivity(self, num_groups: int) -> float:
        check_groups(num_groups, 1)
        num_chosen = self._num_chosen()
        return self.max_grad_norm if self.keep_values else math.sqrt(num_chosen)

    @override
    def scaled(self, factor: float) -> TopAgg:
        check.check_positive("factor", factor)
        if self.keep_values:
            return replace(self, max_grad_norm=self.max_grad_norm * factor)
        if factor != 1:
            raise ValueError(
                f"Expected factor=1 for votes, which have no bound to move, got factor={factor}. Use "
                "TopAgg(keep_values=True), or another clipping."
            )
        return self

    @override
    def for_coordinates(self, num_coordinates: int) -> TopAgg:
        check.check_count("num_coordinates", num_coordinates)
        if isinstance(self.k, float):
            return replace(self, k=max(1, round(self.k * num_coordinates)))
        if self.k > num_coordinates:
            raise ValueError(
                f"Expected k <= {num_coordinates}, the number of private coordinates, got k={self.k}. Lower k, or pass "
                "a fraction."
            )
        return self

    @override
    @torch.no_grad()
    def contributions(self, grads_BP: Tensor, active: Tensor | None = None) -> Tensor:
        if grads_BP.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Expected float32 or float64 gradients, got dtype={grads_BP.dtype}. Convert them: votes are summed in "
                "float32."
            )
        if grads_BP.ndim != 2:
            raise ValueError(
                f"Expected gradients of shape (samples, coordinates), got shape={tuple(grads_BP.shape)}. Flatten them."
            )
        num_coordinates = grads_BP.shape[1]
        self.for_coordinates(num_coordinates)
        num_chosen = self._num_chosen()
        indices = None
        if active is not None:
            if active.shape != (num_coordinates,) or active.dtype != torch.bool:
                raise ValueError(
                    f"Expected active as {num_coordinates} booleans, got shape={tuple(active.shape)} and "
                    f"dtype={active.dtype}. Pass one for each coordinate of the gradients."
                )
            indices = active.nonzero().squeeze(1)
            num_chosen = min(num_chosen, len(indices))
        added_BP = torch.zeros_like(grads_BP)
        if num_chosen == 0:
            return added_BP
        rows = max(1, _CHUNK // num_coordinates)
        for grads, added in zip(torch.split(grads_BP, rows), torch.split(added_BP, rows), strict=True):
            if indices is None:
                added.copy_(self._contributions(grads, num_chosen))
            else:
                finite = grads.isfinite().all(1, keepdim=True)  # the whole sample counts, masked coordinates included
                grads_L = torch.where(finite, grads[:, indices], 0.0)
                added.index_copy_(1, indices, self._contributions(grads_L, num_chosen))
        return added_BP

    def _contributions(self, grads: Tensor, num_chosen: int) -> Tensor:
        """Return the contributions of some samples; each chooses among all given coordinates."""
        if not self.keep_values:
            coins = coin_generator(grads.device) if self.sign == "stochastic" else None
            return top_k_votes(grads, num_chosen, signs=_SIGNS[self.sign], generator=coins)
        values_K, chosen = largest_coordinates(grads, num_chosen)
        norms_B = torch.linalg.vector_norm(values_K, dim=1, dtype=torch.float64)  # no square overflows or vanishes
        factors_B = FlatClipping(self.max_grad_norm).factors(norms_B[None])[0]
        return torch.zeros_like(grads).scatter_(-1, chosen, values_K * factors_B.to(grads.dtype)[:, None])

    @override
    def finish(self, noisy: Tensor, expected_batch_size: int, out: Tensor) -> None:
        """Write the gradient: S / (B sqrt(k)), or u / sqrt(k) with a threshold, or S / B with ``keep_values``."""
        if self.keep_values:
            super().finish(noisy, expected_batch_size, out)
            return
        scale = 1 / math.sqrt(self._num_chosen())
        if self.vote_threshold is None:
            torch.mul(noisy, scale / expected_batch_size, out=out)
        else:
            torch.mul(threshold_votes(noisy, self.vote_threshold * expected_batch_size), scale, out=out)

    def _num_chosen(self) -> int:
        if isinstance(self.k, float):
            raise ValueError(
                f"Expected k as a number of coordinates, got the fraction k={self.k}. Settle it first: "
                "for_coordinates(P)."
            )
        return self.k
