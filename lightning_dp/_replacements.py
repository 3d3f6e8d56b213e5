"""The replacement layers of ``fix``, each made from the layer that it replaces. ``fix`` imports this file."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_dp.system.torch_private import BatchNorm, InstanceNorm, replace_children


class _Exchange(NamedTuple):
    old: nn.Module  # kept alive: its id is a key
    new: nn.Module


def replace(module: nn.Module, changes: list[str]) -> nn.Module:
    """Replace layers inside a module, append a sentence per change, and return the module or its replacement."""
    return _exchanged(module, "", {}, changes)


def can_replace(layer: nn.Module) -> bool:
    """Tell whether ``fix`` changes a layer itself, not only its submodules."""
    if isinstance(layer, BatchNorm):
        return not isinstance(layer, GroupNormWithin) and (
            _trains(layer) or layer.training or layer.running_mean is None
        )
    if isinstance(layer, InstanceNorm):
        return layer.track_running_stats and (_trains(layer) or layer.training)
    return False


def _exchanged(module: nn.Module, name: str, done: dict[int, _Exchange], changes: list[str]) -> nn.Module:
    """Return a module with its layers replaced, or its own replacement; replace a module with several names once."""
    if id(module) in done:
        return done[id(module)].new
    kind = type(module).__name__
    replacement, change = _replaced(module, name)
    done[id(module)] = _Exchange(module, replacement)
    if change:
        changes.append(f"{name or 'the module itself'}: {kind} {change}")
    if replacement is not module:
        replacement.train(module.training)
        if any(hooks for attribute, hooks in vars(module).items() if attribute.endswith("_hooks")):
            changes[-1] += "; hooks registered on it were not carried over"
        return replacement
    children = replace_children(module)
    for child_name, child in [*children.items()]:
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            children[child_name] = _exchanged(child, path, done, changes)
    return module


def _replaced(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return a layer's replacement and a sentence on the change; or the layer and "" if nothing must change."""
    if isinstance(module, BatchNorm) and any(is_lazy(p) for p in module.parameters(recurse=False)):
        raise ValueError(
            f"Expected layers with initialised parameters, got {name or 'module'}={type(module).__name__} without. Run "
            "the module on a batch once before fix."
        )
    if not can_replace(module):
        return module, ""
    if isinstance(module, InstanceNorm):
        return _without_statistics(module)
    norm = cast(nn.BatchNorm2d, module)
    return _group_norm(norm) if _computes_as_torch(norm) else _group_norm_within(norm)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _computes_as_torch(norm: nn.Module) -> bool:
    """Tell whether a batch norm has torch's own ``forward``."""
    return type(norm).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward)


def _num_groups(norm: nn.BatchNorm2d) -> int:
    """Return the number of groups, at most 32, if possible with at least 2 channels each (16 for ``BatchNorm1d``)."""
    num_groups = math.gcd(32, norm.num_features)
    least = 2 if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)) else 16
    while num_groups > 1 and norm.num_features // num_groups < least:
        num_groups //= 2
    return num_groups


def _group_norm(norm: nn.BatchNorm2d) -> tuple[nn.Module, str]:
    channels, groups = norm.num_features, _num_groups(norm)
    made = _like(norm, nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine))
    change = f"became GroupNorm with {groups} groups of {channels // groups} channels"
    if norm.affine:
        own = dict(norm.named_parameters(recurse=False))
        made.load_state_dict({name: own[name].detach() for name, _ in made.named_parameters()})
        change += "; weight and bias carried over"
    return made, change + _dropped(norm)


def _dropped(norm: nn.BatchNorm2d) -> str:
    if norm.running_mean is None:
        return ""
    return "; running statistics dropped: outputs differ, train or fine-tune"


def _group_norm_within(norm: nn.BatchNorm2d) -> tuple[nn.Module, str]:
    """Make a batch norm with its own ``forward`` compute group norm in place of batch norm."""
    groups, dropped = _num_groups(norm), _dropped(norm)
    norm.__class__ = _class_within(type(norm))
    norm.__dict__["_num_groups"] = groups
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return norm, f"keeps its own forward, with {groups} groups of channels in place of the batch" + dropped


class GroupNormWithin(nn.Module):
    """A mixin for a batch norm with its own ``forward``, whose calls of batch norm then compute group norm."""

    normalises_samples_alone = True

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own ``forward`` with group norm in place of batch norm."""
        with _GroupNormInstead(self.__dict__["_num_groups"]):
            return super().forward(*args, **kwargs)

    @override
    def __reduce__(self) -> Any:
        return _new_within, (type(self).__mro__[2],), self.__dict__


_WITHIN: dict[type[nn.Module], Any] = {}


def _class_within(kind: type[nn.Module]) -> Any:
    """Return the class that ``fix`` gives to a batch norm of class ``kind``; it is cached."""
    if kind not in _WITHIN:
        _WITHIN[kind] = made = type(kind.__name__, (GroupNormWithin, kind), {"__module__": kind.__module__})
        made.__qualname__ = kind.__qualname__
    return _WITHIN[kind]


def _new_within(kind: type[nn.Module]) -> nn.Module:
    made = _class_within(kind)
    return made.__new__(made)  # type: ignore[no-any-return]


class _GroupNormInstead(TorchFunctionMode):
    """A mode in which each call of batch norm computes group norm.

    Args:
        num_groups: number of groups of channels.
    """

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self._num_groups = num_groups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._group_norm(*args, **kwargs)
        if func is torch.batch_norm:
            return self._group_norm_of_torch(*args, **kwargs)
        return func(*args, **kwargs)

    def _group_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        return F.group_norm(input, self._num_groups, weight, bias, eps)

    def _group_norm_of_torch(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return F.group_norm(input, self._num_groups, weight, bias, eps)


def _without_statistics(norm: InstanceNorm) -> tuple[nn.Module, str]:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return norm, "no longer tracks running statistics; it normalises with the sample's own in evaluation too"


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy device, dtype and, by parameter name, ``requires_grad`` to the new module, and return it."""
    some = next(old.parameters(), next(old.buffers(), None))
    if some is not None:
        new.to(device=some.device, dtype=some.dtype)
    trains = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trains.get(name, parameter.requires_grad))
    return new
