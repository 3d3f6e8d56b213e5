"""Pruning masks: the public weights of largest magnitude stay active."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.masks.mask import GradientMask, random_subset
from lightning_dp.masks.random import check_seed
from lightning_dp.system.torch_private import NormWithStatistics

_NORM_LAYERS = (NormWithStatistics, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

#: The reason to refuse scores that do not come from public weights.
NOT_PUBLIC = (
    "Scores computed from the private data are not public, and neither is a mask made of them: pass source='initial', "
    "'noisy', or 'public' with reference=<state dict of a model trained on public data>."
)


class MagnitudeMask(GradientMask):
    """A mask that stays constant until it is replaced.

    **Guarantee**: as public as the weights that the masks were computed from; see ``magnitude_masks``.

    Args:
        masks: parameter's name -> bool tensor of its shape, True where active.
        count: first value of ``version``; a resumed run passes its saved value.

    Example:
        >>> mask = MagnitudeMask({"weight": torch.tensor([[True, False]])})
        >>> before = mask.version(0)
        >>> mask.replace({"weight": torch.tensor([[False, True]])})
        >>> mask.version(0) == before
        False
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None, count: int = 0) -> None:
        self.masks = dict(masks or {})
        self.count = count

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks; if they are equal to the old ones, keep the version."""
        same = masks.keys() == self.masks.keys() and all(
            torch.equal(m, self.masks[n].to(m.device)) for n, m in masks.items()
        )
        self.masks = dict(masks)
        self.count += not same

    @override
    def version(self, step: int) -> Hashable:
        """Return the number of changes of the masks, plus the ``count`` that was passed."""
        return self.count

    @override
    def live(self, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return the masks of the given parameters, on their devices; omit parameters without a mask."""
        return {name: self.masks[name].to(p.device) for name, p in parameters.items() if name in self.masks}

    def state_dict(self) -> dict[str, Any]:
        """Return the version and the masks, packed to eight coordinates per byte."""
        bits = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self.masks.items()}
        return {
            "count": self.count,
            "masks": {name: {"shape": list(mask.shape), "bits": bits[name]} for name, mask in self.masks.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MagnitudeMask:
        """Restore the masks that ``state_dict`` saved, with the same version."""
        masks = {}
        for name, saved in state["masks"].items():
            bits = np.unpackbits(saved["bits"].cpu().numpy(), count=math.prod(saved["shape"]))
            masks[name] = torch.from_numpy(bits.astype(np.bool_)).view(saved["shape"])
        return cls(masks, state["count"])


def prunable_names(module: nn.Module) -> list[str]:
    """Return the names of prunable weights: trainable, two or more dimensions, no bias, not in a norm layer.

    These are matrices, convolution kernels, embeddings, and bare parameters of as many dimensions (class tokens,
    positional embeddings). A norm layer is one of torch's, or a module whose class name ends in "norm".

    Args:
        module: the module that trains.

    Returns:
        Qualified names, in the order of ``named_parameters``.

    Example:
        >>> prunable_names(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4)))
        ['0.weight', '2.weight']
    """
    return list(_prunable(module))


def _prunable(module: nn.Module) -> Iterator[str]:
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        norm = isinstance(layer, _NORM_LAYERS) or type(layer).__name__.lower().endswith("norm")
        for name, parameter in layer.named_parameters(recurse=False):
            known = id(parameter) in seen
            seen.add(id(parameter))
            if known or norm or parameter.dim() < 2 or not parameter.requires_grad or "bias" in name.split("_"):
                continue
            yield f"{prefix}.{name}" if prefix else name


def magnitude_masks(
    weights: Mapping[str, Tensor],
    amount: float,
    scope: str,
    prunable: Collection[str],
    scores: str = "magnitude",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return masks that keep the largest weights.

        m = 1 where |w| is among the largest P - int(amount P), over all prunable weights or within each tensor

    **Guarantee**: exactly ``int(amount P)`` weights are removed; of equal weights the first are removed first, so the
    same weights give the same masks on every rank and device. The masks are as public as ``weights``: public for
    initial weights and weights trained on public data, and post-processing for noisy weights. Weights trained on the
    private data without differential privacy are NOT public, which cannot be detected.

    Args:
        weights: name -> weights to score.
        amount: fraction removed, in (0, 1).
        scope: "global" or "layer" (each tensor separately).
        prunable: names that may be removed.
        scores: "magnitude", or "random" for a control that removes as many weights at random.
        seed: seed of the random control, >= 0.

    Returns:
        name -> bool tensor of the weight's shape and device, True where a weight stays, for every prunable name.

    Raises:
        ValueError: arguments out of range, a missing name, weights that are not finite.
        TypeError: for arguments of the wrong kind.

    Example:
        >>> magnitude_masks({"w": torch.tensor([[3.0, -1.0], [0.5, 2.0]])}, 0.5, "global", ["w"])["w"].tolist()
        [[True, False], [False, True]]

    References:
        Watson et al. 2023, Inference and Interference, arXiv 2311.06839.
    """
    check.check_probability("amount", amount)
    check.check_choice("scope", scope, ("global", "layer"))
    check.check_choice("scores", scores, ("magnitude", "random"))
    check_seed(seed)
    missing = [name for name in prunable if name not in weights]
    if missing:
        raise ValueError(
            f"Expected weights for every prunable name, got none for {missing[0]!r}. Pass all of {list(prunable)}."
        )
    chosen = {name: weights[name].detach() for name in prunable}
    groups = [[name] for name in chosen] if scope == "layer" else [list(chosen)] if chosen else []
    masks: dict[str, Tensor] = {}
    for index, names in enumerate(groups):
        flat = torch.cat([_scores(name, chosen[name]) for name in names])
        count = int(amount * flat.numel())
        if scores == "random":
            removed = torch.from_numpy(random_subset(flat.numel(), count, (seed, index)))
        else:
            removed = _smallest(flat, count)
        parts = torch.split(removed.logical_not(), [chosen[name].numel() for name in names])
        masks |= {
            name: part.view(chosen[name].shape).to(chosen[name].device) for name, part in zip(names, parts, strict=True)
        }
    return masks


def public_weights(reference: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the weights of the given parameters from a state dict.

    Args:
        reference: parameter's name -> weights trained on public data.
        parameters: the prunable parameters of the module that trains.

    Raises:
        ValueError: a weight is missing, or has another shape.
        TypeError: something else than a tensor.
    """
    for name, parameter in parameters.items():
        if name not in reference:
            nested = "state_dict" in reference
            what = "Pass checkpoint['state_dict']." if nested else "Pass the state dict of the same module."
            raise ValueError(f"Expected reference to hold every prunable weight, got none for {name!r}. {what}")
        weight = reference[name]
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"Expected reference to hold tensors, got {type(weight).__name__} for {name!r}. {NOT_PUBLIC}"
            )
        if weight.shape != parameter.shape:
            raise ValueError(
                f"Expected reference[{name!r}] of shape {tuple(parameter.shape)}, got shape {tuple(weight.shape)}. "
                "Pass the state dict of the same module."
            )
    return {name: reference[name] for name in parameters}


def _scores(name: str, weight: Tensor) -> Tensor:
    score = weight.flatten().abs().to("cpu", torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if not torch.isfinite(score).all():
        raise ValueError(
            f"Expected finite weights, got a NaN or an infinity in {name!r}. Training has diverged: lower lr."
        )
    return score


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Return a bool tensor that marks the ``count`` smallest scores; of equal scores, the first."""
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    last = scores.kthvalue(count).values
    marked = scores < last
    marked[(scores == last).nonzero().squeeze(1)[: count - int(marked.sum())]] = True
    return marked
