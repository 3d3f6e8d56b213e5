"""A generator and teachers for DataLens that a small budget can pay for: smooth prototypes, matched filters.

Votes are sums of signs, and their noise grows with the square root of pixels times generated images. So images are
coarse, 14 x 14 pixels; the generator holds one smooth image per kind of a class, 8 x 8 cosine coefficients each; and a
vote of a teacher is the sign of the mean of its records of that kind. Kinds divide a class by the signs of fixed cosine
coefficients of the image itself, which is a public rule that looks at one record at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.images import split_of
from benchmarks.tasks import Split

SIZE, COEFFICIENTS = 14, 8
#: Frequencies (rows, columns) whose signs divide a class; the first is the slant of a stroke.
SPLITS = ((1, 1), (2, 1), (1, 2), (2, 2))
#: Largest rotation, change of size, shear and shift of a generated image, in the units of ``affine_grid``.
MOVES = (0.25, 0.15, 0.25, 0.12, 0.12)
FIELD = 7  # rows of the smooth noise on a generated image
Z_DIM = len(MOVES) + FIELD * FIELD


def cosines(count: int, size: int = SIZE) -> Tensor:
    """Return the first cosine waves of length 1, shape ``(count, size)``."""
    waves = torch.cos(math.pi * torch.arange(count)[:, None] * (torch.arange(size) + 0.5) / size)
    return waves / waves.norm(dim=1, keepdim=True)


def kinds(images: Tensor, splits: int) -> Tensor:
    """Return the kind of each image of shape (n, 1, 14, 14): one bit per split, from that image alone."""
    waves = cosines(3)
    signs = [torch.einsum("nhw,h,w->n", images[:, 0], waves[a], waves[b]) > 0 for a, b in SPLITS[:splits]]
    return sum((sign.long() << bit for bit, sign in enumerate(signs)), torch.zeros(len(images), dtype=torch.long))


def coarse_split(name: str, splits: int, *, report: bool) -> Split:
    """Return coarse images: training labels are class times number of kinds plus kind, the others are classes."""
    whole = split_of(f"{name}:half", report=report)
    (x, y), (x_held, y_held) = whole.train.tensors, whole.held_out.tensors
    x, x_held = F.avg_pool2d(x, 2), F.avg_pool2d(x_held, 2)
    return Split(TensorDataset(x, (y << splits) + kinds(x, splits)), TensorDataset(x_held, y_held))


class Matching(nn.Module):
    """A teacher: the logit is the product of the image with a template of its kind, minus 120.

    The templates start at zero. So far below zero the loss of a generated image has no gradient in float32: a template
    learns from records only, and one without records of its kind stays zero and casts no vote.

    Args:
        labels: number of kinds over all classes.
    """

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.templates = nn.Parameter(torch.zeros(labels, SIZE * SIZE))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits of shape (B,)."""
        chosen = F.one_hot(labels, len(self.templates)).to(images.dtype) @ self.templates
        return (images.flatten(1) * chosen).sum(1) - 120.0


class Prototypes(nn.Module):
    """A generator: one smooth image per kind; after training it moves the image a little and adds smooth noise.

    Args:
        labels: number of kinds over all classes.
        moves: how far images move, as a share of ``MOVES``.
        noise: size of the smooth noise.
    """

    waves: Tensor

    def __init__(self, labels: int, *, moves: float, noise: float) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(labels, COEFFICIENTS, COEFFICIENTS))
        self.register_buffer("waves", cosines(COEFFICIENTS))
        self.moves, self.noise = moves, noise

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images of shape (B, 1, 14, 14)."""
        images = (self.waves.T @ self.coefficients[labels] @ self.waves)[:, None]
        return images if self.training else self.varied(images.clamp(-1, 1), z)

    def varied(self, images: Tensor, z: Tensor) -> Tensor:
        """Return the images moved and with smooth noise, both given by z in [-1, 1]."""
        turn, size, shear, right, down = (self.moves * z[:, : len(MOVES)] * torch.tensor(MOVES)).unbind(1)
        rows = [
            torch.stack([(1 + size) * turn.cos(), shear - turn.sin(), right], 1),
            torch.stack([turn.sin(), (1 + size) * turn.cos(), down], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # black outside
        field = math.sqrt(3) * z[:, len(MOVES) :].view(-1, 1, FIELD, FIELD)
        return (moved + self.noise * F.interpolate(field, size=(SIZE, SIZE), mode="bilinear")).clamp(-1, 1)


def coarse_cnn() -> nn.Module:
    """Return a convolutional classifier of coarse images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 25, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
