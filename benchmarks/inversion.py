"""Gradient inversion: the image that an observer can reconstruct from one released gradient.

The release is the library's own: a private step of ``DPStrategy`` over a data set of one image (q = 1), read where a
user's ``on_before_optimizer_step`` would read it. The observer is as strong as it gets: knows the weights, the label,
the mask, the clipping bound and the noise's std s, has other images of the kind (their mean and covariance make a
prior), and looks for the most likely image:

    x^ = argmin_x || m (clip(m g(x)) - released) ||^2 + s^2 (x - mean)^T covariance^-1 (x - mean)

from several starts, of which the best by this measure is kept. Shapes: N attacks at once, P coordinates, 64 pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

from benchmarks.tasks import TASKS, Classifier, Task, train
from lightning_dp import DPStrategy, RandomSparsification
from lightning_dp.masks import RandomMask

LOW, HIGH = -0.3, 0.7  # range of a scaled pixel
BOUND = 1.0
SMALLEST_STD = 1e-4  # of the noise: the prior breaks ties where there is none


@dataclass(frozen=True)
class Release:
    """Released values of one private step, with its public facts.

    Args:
        gradient: as released, shape (P,).
        live: which of its coordinates are, shape (P,).
        noise_std: of a live coordinate.
    """

    gradient: Tensor
    live: Tensor
    noise_std: float


class _Reader(L.Callback):
    """A callback that keeps the gradient of the next optimizer step."""

    gradient: Tensor

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object) -> None:
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])


def release(record: TensorDataset, *, epsilon: float | None, rate: float, seed: int, delta: float) -> Release:
    """Run one private step on one image.

    Args:
        record: the image and its label.
        epsilon: of the step; ``None``: no noise.
        rate: fraction of coordinates left out.
        seed: of the initial weights and of the mask.
        delta: of the step.
    """
    task: Task = TASKS["digits"]
    noise = {"noise_multiplier": 0.0} if epsilon is None else {"target_epsilon": epsilon}
    strategy = DPStrategy(target_delta=delta, max_grad_norm=BOUND, check_per_sample=False, **noise)
    reader = _Reader()
    module = Classifier(task.make_network, lr=1.0, seed=seed)
    callbacks = [reader, RandomSparsification(rate, schedule="constant", seed=seed)] if rate else [reader]
    train(task, module, record, strategy=strategy, callbacks=callbacks, epochs=1)
    return Release(reader.gradient, live_coordinates(module, rate, seed), strategy.plan.noise_multiplier * BOUND)


def live_coordinates(module: Classifier, rate: float, seed: int) -> Tensor:
    """Return the mask as anybody can draw it, because it is public."""
    parameters = dict(module.named_parameters())
    mask = RandomMask(rate, schedule="constant", refresh_steps=1, num_refreshes=1, seed=seed)
    live = mask.live(0, parameters)
    return torch.cat([live.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in parameters.items()])


def clipped_gradients(seed: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function of images (N, 64), labels (N,) and masks (N, P) that gives clipped gradients (N, P),
    differentiably.
    """
    module = Classifier(TASKS["digits"].make_network, lr=1.0, seed=seed).net
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(module, parameters, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    one = functools.partial(grad(loss), weights)

    def clipped(images: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        parts = vmap(one)(images, labels)
        gradients = torch.cat([parts[name].flatten(1) for name in weights], 1) * masks
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        return gradients * (BOUND / norms.clamp(min=BOUND))

    return clipped


@dataclass(frozen=True)
class Prior:
    """Prior knowledge of such images: a normal distribution fitted to other images."""

    mean: Tensor
    precision: Tensor

    @classmethod
    def of(cls, images: Tensor) -> Prior:
        """Fit it to images of shape (M, 64)."""
        return cls(images.mean(0), torch.linalg.inv(torch.cov(images.T) + 1e-3 * torch.eye(images.shape[1])))

    def penalty(self, images: Tensor) -> Tensor:
        """Return squared distances from the mean in units of the covariance, (N,)."""
        away = images - self.mean
        return ((away @ self.precision) * away).sum(1)


def invert(releases: Sequence[Release], labels: Tensor, prior: Prior, *, seed: int, starts: int, steps: int) -> Tensor:
    """Return the most likely images.

    Args:
        releases: N of them, all with the same noise.
        labels: (N,).
        prior: on the images.
        seed: of the weights that the gradients were taken at, and of the starts.
        starts: random images that the search begins from.
        steps: of Adam, for each start.

    Returns:
        Images as the network sees them, (N, 64).
    """
    clipped, generator = clipped_gradients(seed), torch.Generator().manual_seed(seed)
    count, noise_std = len(releases), releases[0].noise_std
    targets = torch.stack([item.gradient for item in releases]).repeat(starts, 1)
    live = torch.stack([item.live for item in releases]).repeat(starts, 1)
    classes = labels.repeat(starts)
    logits = torch.randn(starts * count, prior.mean.numel(), generator=generator).requires_grad_()

    def images() -> Tensor:
        return LOW + (HIGH - LOW) * logits.sigmoid()

    def misfit() -> Tensor:
        found = images()
        distance = (clipped(found, classes, live) - targets * live).square().sum(1)
        return distance + max(noise_std, SMALLEST_STD) ** 2 * prior.penalty(found)

    adam = torch.optim.Adam([logits], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        (logits.grad,) = torch.autograd.grad(misfit().sum(), [logits])
        adam.step()
        decay.step()
    with torch.no_grad():
        best = misfit().view(starts, count).argmin(0)
        return images().view(starts, count, -1)[best, torch.arange(count)]
