"""Norms and weighted sums of per-sample gradients, from one forward and one backward per microbatch."""

from __future__ import annotations

from torch import nn

from lightning_dp import _messages
from lightning_dp.per_sample.base import GradientEngine
from lightning_dp.per_sample.custom import check_rule, register_rule
from lightning_dp.per_sample.engine import Memory, PerSampleEngine
from lightning_dp.per_sample.notices import notices
from lightning_dp.per_sample.single import SingleSampleEngine

__all__ = ["GradientEngine", "PerSampleEngine", "SingleSampleEngine", "check_rule", "make_engine", "register_rule"]


def make_engine(module: nn.Module, *, grad_sample: str, memory: Memory, alone: bool) -> GradientEngine:
    """Return the engine: plain autograd for samples that run alone, rules on operations for microbatches of several.

    Args:
        module: the user's module.
        grad_sample: "auto" and "rules" use rules on operations; "materialize" makes full per-sample gradients.
        memory: ``"fast"`` or ``"lean"``.
        alone: whether every microbatch has one sample.
    """
    for notice in notices(module, runs_samples_alone=alone):
        _messages.info(notice)
    if alone:
        return SingleSampleEngine(module)
    return PerSampleEngine(module, grad_sample="materialize" if grad_sample == "materialize" else "auto", memory=memory)
