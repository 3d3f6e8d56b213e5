"""Causes of gradients that reach private parameters from operations that do not report themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import CUSTOM, PENALTY, WAY_OUT


def hidden_use(names: Sequence[str], cause: str) -> PrivacyError:
    """Return the error of a gradient that no recorded use explains."""
    return PrivacyError(
        "Expected private parameters to be used in operations that report themselves and see samples, got a "
        f"gradient of another use for {[*names]}: {cause}; {WAY_OUT}."
    )


def of_class(classes: Iterable[Any]) -> str:
    """Return a cause that names each ``torch.autograd.Function`` which hides uses, and the way out."""
    return (
        f"{CUSTOM} {', '.join(sorted({one.__name__ for one in classes}))}, which hides "
        "what it computes from them and from samples. Register a rule for it by "
        "lightning_dp.per_sample.register_rule"
    )


def cause_of(names: Sequence[str], hidden: Mapping[str, Any], module: nn.Module) -> str:
    """Return what hides the uses of parameters, and the way out, as a part of a message.

    Args:
        names: qualified names of the parameters.
        hidden: parameters that a ``torch.autograd.Function`` took together with samples, with that class.
        module: holds the parameters.
    """
    if hidden.keys() >= {*names}:
        return of_class(hidden[name] for name in names)
    scripts = [path for path, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]
    held = {next((path for path in scripts if name.startswith(f"{path}.")), None) for name in names}
    if None not in held and (paths := sorted(path for path in held if path)):
        return f"the scripted or traced {paths[0]!r}, which hides its operations. Leave out torch.jit for training"
    return (
        "a torch.autograd.Function, a scripted or compiled function, torch.vmap, a nested tensor, an extension; a "
        "penalty on weights; rows of which there are as many whatever the batch size, so that records share them; or "
        "rows made of numbers in training_step, whose record nobody knows (make tensors in the dataset or in "
        "collate_fn). "
        f"{PENALTY}; per_sample_loss=True lets each record count by itself"
    )
