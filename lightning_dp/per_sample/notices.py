"""Notices for the user about differences from non-private training of a module."""

from __future__ import annotations

from types import FunctionType

from torch import nn

from lightning_dp.per_sample._torch import is_compiled


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


def unused_notice(unused: dict[str, int], total: int) -> str:
    """Return the sentence on parameters that no loss uses.

    Args:
        unused: number of entries by name.
        total: number of entries of all private parameters.

    Example:
        >>> unused_notice({"pooler.weight": 25, "pooler.bias": 5}, 120)[:56]
        'No loss of the checks used 25% of the private parameters'
        >>> unused_notice({"mask_token": 1}, 1000)[:40]
        'No loss of the checks used under 1% of t'
    """
    share = f"{sum(unused.values()) / total:.0%}"
    share = {"0%": "under 1%", "100%": "over 99%"}.get(share, share)
    return (
        f"No loss of the checks used {share} of the private parameters ({_listed(list(unused))}). Non-private training "
        "leaves such parameters as they are. Private training cannot know that no later sample uses them: it "
        "adds noise to them at every step, which takes time and ruins trained weights. If the model does not train "
        "them, call requires_grad_(False) on them."
    )


def _compiled_in(path: str, layer: nn.Module) -> list[str]:
    """Return the path of a compiled layer, or of compiled functions that are attributes of a layer or of its class."""
    if is_compiled(layer):
        return [path or "the module itself"]
    held = {name: value for owner in (*reversed(type(layer).__mro__), layer) for name, value in vars(owner).items()}
    functions = [name for name, value in held.items() if isinstance(value, FunctionType) and is_compiled(value)]
    return [f"{path}.{name}".removeprefix(".") for name in functions]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
