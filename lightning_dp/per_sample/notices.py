"""Notices for the user about differences from non-private training of a module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import FunctionType

from torch import Tensor, nn

from lightning_dp.per_sample._torch import is_compiled
from lightning_dp.system.torch_private import has_own_hooks


def notices(module: nn.Module, *, runs_samples_alone: bool) -> list[str]:
    """Return the differences from non-private training of this module, one sentence each.

    Args:
        module: the user's module.
        runs_samples_alone: whether each sample runs alone, through plain autograd.

    Example:
        >>> [text[:28] for text in notices(nn.Embedding(3, 2, sparse=True), runs_samples_alone=True)]
        ['Embeddings with sparse=True ']
    """
    found = []
    sparse = [
        name or "the module itself" for name, layer in module.named_modules() if getattr(layer, "sparse", False) is True
    ]
    if sparse:
        found.append(
            f"Embeddings with sparse=True get dense gradients ({_listed(sparse)}): noise is added to every coordinate."
        )
    compiled = [name for path, layer in module.named_modules() for name in _compiled_in(path, layer)]
    if compiled and not runs_samples_alone:
        found.append(
            f"Compiled modules and functions run eagerly ({_listed(compiled)}): compiled code does not report what it "
            "does with parameters. grad_sample='single' keeps them compiled."
        )
    return found


def late_notices(parameters: Mapping[str, Tensor], sizes: Mapping[str, int], used: Collection[str]) -> list[str]:
    """Return the differences from non-private training that show once the first batch is there.

    Args:
        parameters: private parameters by name.
        sizes: number of entries, by name, of those that an optimizer steps.
        used: names of those that losses use.

    Example:
        >>> [text[:56] for text in late_notices({}, {"pooler.weight": 25, "pooler.bias": 5, "w": 90}, ["w"])]
        ['No loss of the checks used 25% of the private parameters']
        >>> [text[:40] for text in late_notices({}, {"mask_token": 1, "w": 999}, ["w"])]
        ['No loss of the checks used under 1% of t']
    """
    found, unused = [], {name: size for name, size in sizes.items() if name not in used}
    if unused:
        share = f"{sum(unused.values()) / sum(sizes.values()):.0%}"
        share = {"0%": "under 1%", "100%": "over 99%"}.get(share, share)
        found.append(
            f"No loss of the checks used {share} of the private parameters ({_listed([*unused])}). Non-private "
            "training leaves such parameters as they are. Private training cannot know that no later sample uses them: "
            "it adds noise to them at every step, which takes time and ruins trained weights. If the model does not "
            "train them, call requires_grad_(False) on them."
        )
    if hooked := [name for name, parameter in parameters.items() if has_own_hooks(parameter)]:
        found.append(
            f"Hooks on private parameters are not called ({_listed(hooked)}): they would see raw gradients. Read or "
            "change p.grad in on_before_optimizer_step, where it is private, or put the hook on the layer's output."
        )
    return found


def _compiled_in(path: str, layer: nn.Module) -> list[str]:
    """Return the path of a compiled layer, or of compiled functions that are attributes of a layer or of its class."""
    if is_compiled(layer):
        return [path or "the module itself"]
    held = {name: value for owner in (*reversed(type(layer).__mro__), layer) for name, value in vars(owner).items()}
    functions = [name for name, value in held.items() if isinstance(value, FunctionType) and is_compiled(value)]
    return [f"{path}.{name}".removeprefix(".") for name in functions]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
