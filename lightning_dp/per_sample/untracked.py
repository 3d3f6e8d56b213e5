"""Causes of gradients that reach private parameters from operations that do not report themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_dp.per_sample.layout import PENALTY


def cause_of(names: Sequence[str], hidden: Mapping[str, str], module: nn.Module) -> str:
    """Return what hides the uses of parameters, and the way out, as a part of a message.

    Args:
        names: qualified names of the parameters.
        hidden: parameters that a ``torch.autograd.Function`` took together with samples, with its name.
        module: holds the parameters.
    """
    if hidden.keys() >= {*names}:
        return (
            f"the torch.autograd.Function {', '.join(sorted({hidden[name] for name in names}))}, which hides "
            "what it computes from them and from samples. Register a rule for it by "
            "lightning_dp.per_sample.register_rule"
        )
    scripts = [path for path, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]
    held = {next((path for path in scripts if name.startswith(f"{path}.")), None) for name in names}
    if None not in held and (paths := sorted(path for path in held if path)):
        return f"the scripted or traced {paths[0]!r}, which hides its operations. Leave out torch.jit for training"
    return (
        "a torch.autograd.Function, a scripted or compiled function, torch.vmap, an extension; a penalty "
        "on weights; or rows of which there are as many whatever the batch size, so that records share them. "
        f"{PENALTY}; per_sample_loss=True lets each record count by itself"
    )
