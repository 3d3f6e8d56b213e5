"""Rules: per-sample gradients of an operation's parameters, from its inputs and backprops."""

from __future__ import annotations

from lightning_dp.per_sample.rules.base import Call, Rule
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.embedding import EmbeddingRule
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.rules.norm import GroupNormRule, InstanceNormRule, LayerNormRule, RMSNormRule

__all__ = ["Call", "Rule", "registered"]


def registered() -> list[type[Rule]]:
    """Return the built-in rule classes, one per family of layers."""
    return [LinearRule, ConvRule, EmbeddingRule, LayerNormRule, RMSNormRule, GroupNormRule, InstanceNormRule]
