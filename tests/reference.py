"""Slow, obviously right implementations that the fast ones are compared with.

Everything here runs one sample at a time through plain autograd: no hooks, no layer rules, no vectorisation.

Example:
    >>> import torch
    >>> layer = torch.nn.Linear(3, 2).double()
    >>> x = torch.randn(4, 3, dtype=torch.float64)
    >>> grads = per_sample_gradients(layer, lambda i: layer(x[i : i + 1]).square().sum(), 4)
    >>> grads["weight"].shape
    torch.Size([4, 2, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

LossOfSample = Callable[[int], Tensor]


def gradient_of(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of one scalar loss for every trainable parameter; zero where it does not depend on it."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in named.items()}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad.detach().clone()
        for (name, p), grad in zip(named.items(), grads, strict=True)
    }


def single_gradients(module: nn.Module, loss_of: LossOfSample, batch_size: int) -> list[dict[str, Tensor]]:
    """Return one gradient dictionary for each sample; ``loss_of(i)`` runs sample ``i`` alone and returns its loss."""
    return [gradient_of(module, loss_of(i)) for i in range(batch_size)]


def per_sample_gradients(module: nn.Module, loss_of: LossOfSample, batch_size: int) -> dict[str, Tensor]:
    """Return per-sample gradients, parameter name -> ``(batch_size, *shape)``, by a loop over batches of one."""
    singles = single_gradients(module, loss_of, batch_size)
    return {
        name: torch.stack([single[name] for single in singles]) if singles else p.new_zeros((0, *p.shape)).detach()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def squared_norms(
    grads: Mapping[str, Tensor], groups: Sequence[Sequence[str]], mask: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Return squared norms ``(groups, batch)`` of (masked) per-sample gradients, one sample and one group at a time."""
    batch_size = next(iter(grads.values())).shape[0]
    dtype = next(iter(grads.values())).dtype
    out = torch.zeros(len(groups), batch_size, dtype=dtype)
    for row, names in enumerate(groups):
        for i in range(batch_size):
            for name in names:
                grad = grads[name][i] if mask is None or name not in mask else grads[name][i] * mask[name]
                out[row, i] += grad.square().sum()
    return out


def weighted_sum(grads: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Return ``sum_i factors[i] * grad_i``; a sample whose factor is 0 is left out, whatever its gradient holds."""
    out = {}
    for name, grad in grads.items():
        total = torch.zeros_like(grad[0]) if len(grad) else grad.new_zeros(grad.shape[1:])
        for i, factor in enumerate(factors.tolist()):
            if factor != 0:
                total = total + factor * grad[i]
        out[name] = total
    return out
