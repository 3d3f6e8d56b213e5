"""Which rule gives the per-sample gradients of a layer, by the ``forward`` that really runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_dp.per_sample.rules.base import Call, Rule
from lightning_dp.per_sample.rules.conv import ConvRule
from lightning_dp.per_sample.rules.embedding import EmbeddingRule
from lightning_dp.per_sample.rules.linear import LinearRule, TransposedLinearRule
from lightning_dp.per_sample.rules.norm import GroupNormRule, InstanceNormRule, LayerNormRule, RMSNormRule

__all__ = ["Call", "Rule", "registered", "rule_for"]

_CONV, _TRANSPOSED = ConvRule(), TransposedLinearRule()

_RULES: dict[Callable[..., Any], Rule] = {
    nn.Linear.forward: LinearRule(),
    nn.Embedding.forward: EmbeddingRule(),
    nn.Conv1d.forward: _CONV,
    nn.Conv2d.forward: _CONV,
    nn.Conv3d.forward: _CONV,
    nn.LayerNorm.forward: LayerNormRule(),
    nn.GroupNorm.forward: GroupNormRule(),
    nn.InstanceNorm2d.forward: InstanceNormRule(),  # one function for 1, 2 and 3 axes
    nn.RMSNorm.forward: RMSNormRule(),
}

_HELPERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("_conv_forward",),
    nn.Conv2d: ("_conv_forward",),
    nn.Conv3d: ("_conv_forward",),
    nn.InstanceNorm1d: ("_apply_instance_norm",),
    nn.InstanceNorm2d: ("_apply_instance_norm",),
    nn.InstanceNorm3d: ("_apply_instance_norm",),
}
"""Methods that ``forward`` calls and a subclass may have replaced."""


def registered() -> list[Rule]:
    """Return every rule."""
    return [*dict.fromkeys(_RULES.values()), _TRANSPOSED]


def rule_for(module: nn.Module) -> Rule | None:
    """Return the rule of a layer, or None where the fallback has to serve.

    Example:
        >>> type(rule_for(nn.Linear(1, 1))).__name__, rule_for(nn.PReLU())
        ('LinearRule', None)
    """
    kind = type(module)
    if "forward" in module.__dict__:
        return None
    for known, methods in _HELPERS.items():
        if isinstance(module, known) and any(getattr(kind, name) is not getattr(known, name) for name in methods):
            return None
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return _TRANSPOSED
    return _RULES.get(kind.forward)
