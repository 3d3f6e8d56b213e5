"""Decide, for every private parameter, which module is recorded and by which of the three ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.fallback import RecomputeUnit
from lightning_dp.per_sample.layout import WAY_OUT, BatchAxis, CallLayout, Unclear
from lightning_dp.per_sample.learning import Learned
from lightning_dp.per_sample.recorder import Recorder, Slot
from lightning_dp.per_sample.rule_unit import RuleUnit
from lightning_dp.per_sample.rules import Rule, rule_for
from lightning_dp.per_sample.units import ExpandUnit, Source
from lightning_dp.per_sample.workspace import Workspace

_WHOLE = (nn.MultiheadAttention,)
"""Modules that use the parameters of the modules inside them functionally."""

_NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)
"""Modules that hold parameters for the module around them."""

_FIX = "lightning_dp.fix replaces it by a layer that works"


class Place:
    """One place of a private parameter: where it hangs in the module tree."""

    def __init__(self, owner_name: str, slot: Slot, rule: Rule | None) -> None:
        self.owner_name = owner_name
        self.slot = slot
        self.rule = rule
        self.path = f"{owner_name}.{slot.local}" if owner_name else slot.local


class Places:
    """All places of the private parameters of a module.

    Args:
        module: the root.
        parameters: qualified name to parameter.

    Raises:
        PrivacyError: a place has no per-sample gradient.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.root = module
        self.modules = dict(module.named_modules())
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.places: list[Place] = []
        for owner_name, owner in self.modules.items():
            found = [(local, p) for local, p in owner._parameters.items() if p is not None and id(p) in names]
            if not found:
                continue
            _refuse(owner_name, owner, [local for local, _ in found])
            self._refuse_random_attention(owner_name)
            if type(owner).__module__.startswith("opacus.layers") and rule_for(owner) is None:
                # opacus lists the weights of its inner layers a second time, under the names of the layer it replaces
                found = [(local, p) for local, p in found if not _is_alias(owner, p)]
            rule = rule_for(owner)
            for local, parameter in found:
                known = rule if rule is not None and local in rule.parameters else None
                self.places.append(Place(owner_name, Slot(owner, local, parameter, names[id(parameter)]), known))
        missing = sorted(set(parameters) - {place.slot.name for place in self.places})
        if missing:
            raise PrivacyError(
                f"Expected every private parameter to be a parameter of the module, got {missing} outside of it. "
                "Was a layer replaced after the optimizer was made?"
            )

    @property
    def tried(self) -> set[str]:
        """Paths whose way had to be found out while the layout was learned."""
        return {place.path for place in self.places}

    def bare(self) -> dict[str, tuple[str, Slot]]:
        """Return the parameters that may be expanded: no rule, two axes or more, the first of length 1."""
        return {
            place.path: (place.owner_name, place.slot)
            for place in self.places
            if place.rule is None
            and place.slot.parameter.dim() >= 2
            and place.slot.parameter.shape[0] == 1
            and self._whole(place.owner_name) is None
        }

    def layers(self) -> list[str]:
        """Return the names of modules with a rule."""
        return sorted({place.owner_name for place in self.places if place.rule is not None})

    def _whole(self, name: str) -> str | None:
        """Return the module around (or at) a name that must be taken as one."""
        parts = name.split(".") if name else []
        for end in range(len(parts) + 1):
            prefix = ".".join(parts[:end])
            if isinstance(self.modules.get(prefix), _WHOLE):
                return prefix
        return None

    def _refuse_random_attention(self, name: str) -> None:
        whole = self._whole(name)
        attention = self.modules[whole] if whole is not None else None
        if isinstance(attention, nn.MultiheadAttention) and attention.dropout > 0 and attention.training:
            raise PrivacyError(
                f"Expected attention without dropout inside, got dropout={attention.dropout} in {whole!r}. "
                f"Set it to 0, or {_FIX}; {WAY_OUT}."
            )

    def home(self, place: Place, learned: Learned) -> str:
        """Return the smallest module around a parameter that is called on samples and returns samples."""
        whole = self._whole(place.owner_name)
        name = place.owner_name if whole is None else whole
        while name and isinstance(self.modules[name], _NEVER_CALLED):
            name = name.rpartition(".")[0]
        while not _carries_samples(learned.layouts.get(name, [])):
            parents = learned.parents.get(name, set())
            if not parents:
                # never called: its use, if any, is found after the backward
                return name
            parent = next(iter(parents))
            if len(parents) > 1 or parent is None:
                raise PrivacyError(
                    f"Expected parameter {place.path!r} inside a module that is called with samples, got module "
                    f"{name!r}, which is called without a batch axis. Give its input the batch axis; {WAY_OUT}."
                )
            if parent and not place.path.startswith(f"{parent}."):
                raise PrivacyError(
                    f"Expected parameter {place.path!r} inside the modules that call its layer with samples, got a call from "
                    f"{parent!r}, which does not contain it. Register the layer there, or {WAY_OUT}."
                )
            name = parent
        return name


def _is_alias(owner: nn.Module, parameter: nn.Parameter) -> bool:
    inner = (module for module in owner.modules() if module is not owner)
    return any(parameter is other for module in inner for other in module._parameters.values())


def _carries_samples(layouts: list[CallLayout] | Unclear) -> bool:
    if isinstance(layouts, Unclear):
        return True
    return bool(layouts) and all(
        any(isinstance(axis, (BatchAxis, Unclear)) for axis in axes)
        for call in layouts
        for axes in (call.inputs, call.outputs)
    )


def _refuse(name: str, module: nn.Module, locals_: Iterable[str]) -> None:
    """Raise for modules whose per-sample gradient cannot be known from their calls."""
    if isinstance(module, nn.RNNBase):
        raise PrivacyError(
            f"Expected layers with per-sample gradients, got {type(module).__name__} at {name!r}. {_FIX}; {WAY_OUT}."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise PrivacyError(
            f"Expected modules that hooks can see into, got a scripted one at {name!r}. Leave it unscripted; {WAY_OUT}."
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        raise PrivacyError(
            f"Expected layers that keep samples apart, got {type(module).__name__} at {name!r}, which mixes them. "
            f"{_FIX}."
        )
    hooks = {type(hook).__module__ for hook in module._forward_pre_hooks.values()}
    normed = hooks & {"torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"}
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList) or normed:
        raise PrivacyError(
            f"Expected parameters used as they are, got a parametrization of {sorted(locals_)} in module {name!r} "
            f"(weight_norm, spectral_norm, ...). Remove it; {WAY_OUT}."
        )


def assign(
    recorder: Recorder,
    places: Places,
    learned: Learned,
    *,
    workspace: Workspace | None,
    materialise: bool,
) -> list[Source]:
    """Return the units that together give the gradient of every private parameter.

    Args:
        recorder: shared state.
        places: of the parameters.
        learned: layout of every call.
        workspace: where gradients are kept from the norms to the weighted sum; None to make them twice.
        materialise: always make the full per-sample gradients.

    Raises:
        PrivacyError: the layout of a module that is needed is unclear.
    """
    ruled: dict[str, list[Place]] = {}
    expanded: dict[str, list[Place]] = {}
    recomputed: dict[str, list[Place]] = {}
    for place in places.places:
        owner = place.owner_name
        if place.path in learned.parameters:
            expanded.setdefault(owner, []).append(place)
        elif place.rule is not None and places._whole(owner) is None and _readable(owner, learned):
            ruled.setdefault(owner, []).append(place)
        else:
            recomputed.setdefault(places.home(place, learned), []).append(place)
    keep = workspace is not None or materialise  # of layers with a rule; the others' cannot be made twice alike
    units: list[Source] = []
    for name, mine in ruled.items():
        rule = mine[0].rule
        assert rule is not None
        calls = frozenset(index for owner, index in learned.inputs if owner == name)
        units.append(
            RuleUnit(
                recorder,
                places.modules[name],
                name,
                [place.slot for place in mine],
                _clear(name, learned),
                rule=rule,
                expanded=calls,
                materialise=materialise,
                workspace=workspace,
                keep=keep,
            )
        )
    for name, mine in expanded.items():
        slots = [place.slot for place in mine]
        units.append(ExpandUnit(recorder, places.modules[name], name, slots, learned.layouts.get(name, [])))
    for name, mine in recomputed.items():
        slots = [place.slot for place in mine]
        start = len(name) + 1 if name else 0
        paths: dict[str, list[str]] = {}
        for place in mine:
            paths.setdefault(place.slot.name, []).append(place.path[start:])
        units.append(RecomputeUnit(recorder, places.modules[name], name, slots, _clear(name, learned), paths=paths))
    return units


def _readable(name: str, learned: Learned) -> bool:
    """Tell whether all calls of a layer carry the batch (or are unclear, which is then said)."""
    layouts = learned.layouts.get(name, [])
    return isinstance(layouts, Unclear) or all(call.inputs[:1] != (None,) for call in layouts)


def _clear(name: str, learned: Learned) -> list[CallLayout] | Unclear:
    layouts = learned.layouts.get(name, [])
    reason = layouts.reason if isinstance(layouts, Unclear) else None
    if not isinstance(layouts, Unclear):
        for call in layouts:
            reason = next((a.reason for a in (*call.inputs, *call.outputs) if isinstance(a, Unclear)), reason)
    if reason is not None:
        raise PrivacyError(
            f"Expected to see which samples module {name!r} works on, but {reason}. Give its calls one batch axis; "
            f"{WAY_OUT}."
        )
    return layouts
