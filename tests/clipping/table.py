"""Every clipping, and what one sample adds to the sum under it: a new clipping enters the table."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dp.clipping import (
    AutomaticClipping,
    Clipping,
    FlatClipping,
    NoClipping,
    PerLayerClipping,
    PSACClipping,
    TopAgg,
)
from lightning_dp.clipping.contribution import ExplicitContribution

# clipping, number of groups
CONTRACT: list[tuple[Clipping, int]] = [
    (FlatClipping(1.0), 1),
    (FlatClipping(0.1), 1),
    (FlatClipping(1e-6), 1),
    (FlatClipping(3e7), 1),
    (PerLayerClipping(0.7), 1),
    (PerLayerClipping(0.7), 3),
    (PerLayerClipping(max_grad_norms=(0.1, 1e-5, 30.0)), 3),
    (PerLayerClipping(max_grad_norms={"a": 0.1, "b": 2.0}), 2),
    (PerLayerClipping(0.7, noise="equal"), 3),
    (PerLayerClipping(0.7, group_weights={"a.*": 0.5, "b.*": 3.0}), 2),
    (AutomaticClipping(), 1),
    (AutomaticClipping(gamma=0.0), 1),
    (AutomaticClipping(gamma=1e-30), 1),
    (AutomaticClipping(max_grad_norm=1e-3), 1),
    (AutomaticClipping(gamma=0.0, max_grad_norm=1e30), 1),
    (AutomaticClipping(per_layer=True), 3),
    (AutomaticClipping(gamma=0.0, per_layer=True), 3),
    (PSACClipping(), 1),
    (PSACClipping(gamma=0.0), 1),
    (PSACClipping(gamma=1e-30, max_grad_norm=0.3), 1),
    (PSACClipping(gamma=1e-300), 1),
    (PSACClipping(gamma=30.0, max_grad_norm=1e30), 1),
    (PSACClipping(per_layer=True, max_grad_norm=0.7), 3),
    (TopAgg(1), 1),
    (TopAgg(3), 1),
    (TopAgg(3, sign="plain"), 1),
    (TopAgg(8), 1),
    (TopAgg(5, vote_threshold=0.5), 1),
    (TopAgg(3, keep_values=True, max_grad_norm=0.3), 1),
    (TopAgg(8, keep_values=True, max_grad_norm=1e-20), 1),
    (NoClipping(), 2),
]
IDS = [f"{clipping}-{groups}" for clipping, groups in CONTRACT]
# a unit vector: the shape of the gradients whose norms are given
DIRECTION = torch.tensor([0.1, -0.7, 0.3, -0.2, 0.4, 0.25, -0.15, 0.35], dtype=torch.float64)
DIRECTION /= DIRECTION.norm()


class Given:
    """Samples with given norms in every group, whose gradients have one direction.

    Args:
        norms: (G, B).
    """

    active = None

    def __init__(self, norms: Tensor) -> None:
        self.norms = norms
        self.gradients = (norms[0].double()[:, None] * DIRECTION).to(norms.dtype)
        self.factors = self.total = torch.zeros(0)

    def add_weighted(self, factors_GB: Tensor) -> None:
        self.factors = factors_GB

    def add_sum(self, total_P: Tensor) -> None:
        self.total = total_P


def contribution_norms(clipping: Clipping, norms: Tensor) -> Tensor:
    """Norm of each sample's contribution over all groups, in float64, for (G, B) norms; 0 * inf counts as 0."""
    contribution = clipping.contribution(Given(norms))
    if isinstance(contribution, ExplicitContribution):
        return contribution.values.double().norm(dim=1)
    factors = contribution.factors
    parts = torch.where(factors == 0, 0.0, factors.double() * norms.double())
    return parts.square().sum(dim=0).sqrt()
