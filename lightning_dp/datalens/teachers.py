"""All teachers as one stacked model that learns and votes in a few large operations per chunk of teachers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lightning_dp.datalens.shards import Shards, public_generator
from lightning_dp.datalens.votes import top_k_votes
from lightning_dp.system.torch_private import NormWithStatistics

_NORMS = (NormWithStatistics,)
State = dict[str, Tensor]


class _Chunk(NamedTuple):
    parameters: State  # each with a leading axis of teachers, matrices transposed: see _as_read
    buffers: State
    shards: Shards
    optimizer: torch.optim.Optimizer

    @property
    def num_teachers(self) -> int:
        return len(self.shards.labels)


class Teachers:
    """Discriminators on disjoint shards, stacked and vmapped.

    **Guarantee**: teacher i depends on its own shard, public randomness and generated samples only. If its numbers
    become infinite or NaN, the other teachers are not affected. NOT private: weights, votes, losses. This object is not
    an ``nn.Module``, so the checkpoint of a module that holds it does not contain it.

    Memory: shards, parameters and two moments per parameter of all teachers; activations of ``chunk_size`` teachers.

    Args:
        discriminator: ``discriminator(features, labels)`` -> logits of shape (B,) or (B, 1); a template, not trained
            itself. Each teacher draws its own initial weights with the ``reset_parameters`` of the layers; parameters
            of layers without one start from the template's values.
        shards: the records of these teachers.
        numbers: numbers of these teachers in the whole run, which determine their initial weights.
        lr: learning rate of Adam.
        betas: Adam's betas.
        chunk_size: teachers computed at once.
        seed: public seed.
        device: where teachers and shards are kept.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        shards: Shards,
        *,
        numbers: Sequence[int],
        lr: float,
        betas: tuple[float, float],
        chunk_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._template = copy.deepcopy(discriminator).to("meta")
        self._chunks: list[_Chunk] = []
        for start in range(0, len(numbers), chunk_size):
            part = slice(start, start + chunk_size)
            copies = [_fresh_copy(discriminator, seed, number) for number in numbers[part]]
            parameters, buffers = stack_module_state(copies)
            parameters = {
                name: _as_read(p.detach().to(device)).contiguous().requires_grad_() for name, p in parameters.items()
            }
            own = Shards(shards.features[part].to(device), shards.labels[part].to(device))
            fused = device.type in ("cpu", "cuda") or None  # one pass over weights and moments: half the time of a step
            optimizer = torch.optim.Adam(parameters.values(), lr=lr, betas=betas, fused=fused)
            self._chunks.append(_Chunk(parameters, {n: b.to(device) for n, b in buffers.items()}, own, optimizer))

    def __len__(self) -> int:
        return sum(chunk.num_teachers for chunk in self._chunks)

    def learn(self, fakes: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Take one Adam step for every teacher, on its own records and on generated samples.

            loss_i = mean BCE(D_i(records), 1) + mean BCE(D_i(fakes), 0)

        Args:
            fakes: generated samples, shape (B, ...), the same for all teachers.
            labels: labels that the samples were generated for, shape (B,).
            positions: positions within each shard of the records to learn from, shape (R,).
        """
        self._template.train()
        fakes = fakes.detach()
        for chunk in self._chunks:
            real, real_labels = chunk.shards.features[:, positions], chunk.shards.labels[:, positions]
            num = chunk.num_teachers
            features = torch.cat([real.to(fakes.dtype), fakes.expand(num, *fakes.shape)], dim=1)
            both_labels = torch.cat([real_labels, labels.expand(num, -1)], dim=1)
            logits = self._logits(chunk.parameters, chunk.buffers, features, both_labels)
            on_real, on_fake = torch.split(logits, [len(positions), len(labels)], dim=1)
            losses = F.softplus(-on_real).mean(1) + F.softplus(on_fake).mean(1)
            chunk.optimizer.zero_grad()
            torch.autograd.backward(losses.sum())
            chunk.optimizer.step()

    def sum_of_votes(
        self,
        fakes: Tensor,
        labels: Tensor,
        top_k: int,
        *,
        signs: str = "sign",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the sum of all teachers' votes on each generated sample.

            g_i = - d/dx BCE(D_i(x, y), 1),  sum over i of top_k_votes(g_i)

        Args:
            fakes: generated samples, shape (B, ...).
            labels: labels of the samples, shape (B,).
            top_k: k, votes of a teacher on one sample.
            signs: see ``top_k_votes``.
            generator: see ``top_k_votes``.

        Returns:
            Whole numbers, shape (B, D), float32. NOT private before ``VoteRelease`` adds noise.
        """
        self._template.eval()
        sums = torch.zeros(len(fakes), fakes[0].numel(), device=fakes.device)
        for chunk in self._chunks:
            copies = fakes.detach().expand(chunk.num_teachers, *fakes.shape).contiguous().requires_grad_()
            fixed = {name: parameter.detach() for name, parameter in chunk.parameters.items()}
            logits = self._logits(fixed, chunk.buffers, copies, labels.expand(chunk.num_teachers, -1))
            (descents,) = torch.autograd.grad(-F.softplus(-logits).sum(), copies)
            sums += top_k_votes(descents.flatten(2), top_k, signs=signs, generator=generator).sum(0)
        return sums

    def _logits(self, parameters: State, buffers: State, features: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of a chunk, shape (teachers, B), in float32."""
        as_read = {name: _as_read(stored) for name, stored in parameters.items()}

        def of_one(parameters: State, buffers: State, features: Tensor, labels: Tensor) -> Tensor:
            out: Tensor = functional_call(self._template, (parameters, buffers), (features, labels))
            return out.flatten()

        logits: Tensor = vmap(of_one, randomness="different")(as_read, buffers, features, labels)
        if logits.shape != labels.shape:
            raise ValueError(
                f"Expected the discriminator to return one logit per sample, got {tuple(logits.shape[1:])} values for "
                f"{labels.shape[1]} samples. Return logits of shape (B,) or (B, 1)."
            )
        return logits.float()


def check_discriminator(discriminator: nn.Module) -> None:
    """Refuse a discriminator that has batch norm or running statistics, or no trainable parameters."""
    for name, layer in discriminator.named_modules():
        if isinstance(layer, _NORMS) and (layer.track_running_stats or "Batch" in type(layer).__name__):
            raise ValueError(
                f"Expected a discriminator without batch statistics, got {type(layer).__name__} at {name!r}. Use "
                "GroupNorm or LayerNorm, or no normalisation."
            )
    if not any(parameter.requires_grad for parameter in discriminator.parameters()):
        raise ValueError(
            "Expected a discriminator with trainable parameters, got none with requires_grad=True. Unfreeze it."
        )


def _fresh_copy(discriminator: nn.Module, seed: int, number: int) -> nn.Module:
    """Return a copy of the discriminator with initial weights of its own, drawn on the CPU from the public seed."""
    fresh = copy.deepcopy(discriminator).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(public_generator(seed, 1, number).initial_seed())
        for layer in fresh.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
    return fresh


def _as_read(stacked: Tensor) -> Tensor:
    """Return a view of stacked parameters with matrices transposed: from the module's to the stored layout, or back."""
    return stacked.mT if stacked.dim() == 3 else stacked
