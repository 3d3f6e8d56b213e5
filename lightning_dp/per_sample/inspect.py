"""Inspection of a module's layers without data: how each would be trained privately."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from lightning_dp.fix import fix
from lightning_dp.per_sample.independence import find_unsupported


@dataclass(frozen=True)
class LayerReport:
    """The report on one layer: its parameters, its handling and its problem.

    Args:
        name: qualified name; "" is the module itself.
        kind: name of its class.
        num_trainable: number of trainable entries in the parameters of the layer itself, without submodules.
        handling: how its per-sample gradients are computed, or why none are needed.
        problem: why it cannot be trained privately in its current form; "" if it can.
        fix: what ``lightning_dp.fix`` would do; "" for nothing.
    """

    name: str
    kind: str
    num_trainable: int
    handling: str
    problem: str
    fix: str


def inspect(module: nn.Module) -> list[LayerReport]:
    """List the layers of a module that have parameters, no submodules, or a problem.

    The module stays unchanged; ``fix`` is tried on a copy.

    **Guarantee**: none about privacy: functions inside ``forward`` and the loss are not seen. The independence check at
    the first batch of a run sees them.

    Args:
        module: in the mode in which training begins, parameters initialised.

    Returns:
        One entry per layer, in the order of ``named_modules()``.

    Raises:
        ValueError: a lazy layer has not seen its first batch.

    Example:
        >>> [(layer.name, layer.problem[:9]) for layer in inspect(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))]
        [('0', ''), ('1', 'BatchNorm')]
    """
    problems = {name: why for name, _, why in find_unsupported(module)}
    changes = dict(_split(change) for change in fix(copy.deepcopy(module)).changes)
    shared = _shared(module)
    layers = []
    for name, layer in module.named_modules():
        own = list(layer.parameters(recurse=False))
        if not own and name not in problems and next(layer.children(), None) is not None:
            continue
        trainable = [parameter for parameter in own if parameter.requires_grad]
        handling = _handling(layer, own, trainable)
        layers.append(
            LayerReport(
                name=name,
                kind=type(layer).__name__,
                num_trainable=sum(parameter.numel() for parameter in trainable),
                handling=handling + shared.get(name, ""),
                problem=problems.get(name, ""),
                fix=changes.get(name or "the module itself", ""),
            )
        )
    return layers


def _split(change: str) -> tuple[str, str]:
    """Return the two parts of a sentence of ``fix``: the layer's name and the rest."""
    name, _, rest = change.partition(": ")
    return name, rest


_RULES = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
"""Layers whose operations have rules, with the parameters as they are."""


def _handling(layer: nn.Module, own: list[nn.Parameter], trainable: list[nn.Parameter]) -> str:
    if not own:
        return "no parameters"
    if not trainable:
        return "frozen"
    known = next((kind for kind in _RULES if isinstance(layer, kind)), None)
    if known is not None and not parametrize.is_parametrized(layer):
        return "norms from one backward"
    return "by the operations that use it: a rule, or one copy a sample"


def _shared(module: nn.Module) -> dict[str, str]:
    """Return, by layer name, a note on layers that share a trainable parameter with another layer."""
    places: dict[int, list[str]] = {}
    for name, layer in module.named_modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad:
                places.setdefault(id(parameter), []).append(name)
    return dict(_other_places(places))


def _other_places(places: dict[int, list[str]]) -> Iterator[tuple[str, str]]:
    for names in places.values():
        for name in names if len(names) > 1 else ():
            yield name, f"; weights shared with {', '.join(other for other in names if other != name)}"
