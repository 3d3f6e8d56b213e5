"""Small conditional networks for tables and square images, to start from. None has BatchNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

_SLOPE = 0.2


def _one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    return F.one_hot(labels, num_classes).to(like.dtype)


class MLPGenerator(nn.Module):
    """A perceptron that maps noise and a label to one row of a table.

    Args:
        z_dim: coordinates of the noise.
        num_features: columns of the table.
        num_classes: number of labels.
        hidden: width of the two hidden layers.
        bounded: whether to end in tanh, for features scaled to [-1, 1] by public bounds.

    As input: z of shape (B, z_dim), labels of shape (B,). As output: features, shape (B, num_features).

    Example:
        >>> MLPGenerator(4, 3, num_classes=2)(torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, z_dim: int, num_features: int, *, num_classes: int = 1, hidden: int = 64, bounded: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            *_hidden_layers(z_dim + num_classes, hidden),
            nn.Linear(hidden, num_features),
            nn.Tanh() if bounded else nn.Identity(),
        )

    @override
    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return features of shape (B, num_features)."""
        out: Tensor = self.layers(torch.cat([z, _one_hot(labels, self.num_classes, z)], dim=1))
        return out


class MLPDiscriminator(nn.Module):
    """A perceptron that maps one row and its label to a logit, which is high for real rows.

    Args:
        num_features: columns of the table.
        num_classes: number of labels.
        hidden: width of the two hidden layers. Keep it small: a teacher has few records, and the time of a step grows
            with the width and the number of teachers.

    As input: features of shape (B, ...), flattened; labels of shape (B,). As output: logits, shape (B, 1).
    """

    def __init__(self, num_features: int, *, num_classes: int = 1, hidden: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(*_hidden_layers(num_features + num_classes, hidden), nn.Linear(hidden, 1))

    @override
    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return logits of shape (B, 1)."""
        flat = features.flatten(1)
        out: Tensor = self.layers(torch.cat([flat, _one_hot(labels, self.num_classes, flat)], dim=1))
        return out


class ConvGenerator(nn.Module):
    """A network that maps noise and a label to a square image in [-1, 1], by two transposed convolutions.

    Args:
        z_dim: coordinates of the noise.
        image_size: height and width, a multiple of 4.
        channels: channels of the image.
        num_classes: number of labels.
        width: channels before the last convolution.

    As input: z of shape (B, z_dim), labels of shape (B,). As output: images, shape (B, channels, image_size,
    image_size).

    Raises:
        ValueError: an image size that is not a multiple of 4.

    References:
        Radford, Metz and Chintala 2016, Unsupervised Representation Learning with DCGAN (here with group
        normalisation).
    """

    def __init__(
        self, z_dim: int, *, image_size: int, channels: int = 1, num_classes: int = 1, width: int = 32
    ) -> None:
        super().__init__()
        self.num_classes, self._shape = num_classes, (2 * width, *_quarter(image_size))
        self.start = nn.Linear(z_dim + num_classes, 2 * width * (image_size // 4) ** 2)
        self.layers = nn.Sequential(
            nn.GroupNorm(1, 2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(1, width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    @override
    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return images of shape (B, channels, image_size, image_size)."""
        start = self.start(torch.cat([z, _one_hot(labels, self.num_classes, z)], dim=1))
        out: Tensor = self.layers(start.view(-1, *self._shape))
        return out


class ConvDiscriminator(nn.Module):
    """A network that maps a square image and its label, given as constant planes, to a logit by two convolutions.

    Args:
        image_size: height and width, a multiple of 4.
        channels: channels of the image.
        num_classes: number of labels.
        width: channels after the first convolution.

    As input: images of shape (B, channels, image_size, image_size), labels of shape (B,). As output: logits, shape (B,
    1).

    Raises:
        ValueError: an image size that is not a multiple of 4.
    """

    def __init__(self, *, image_size: int, channels: int = 1, num_classes: int = 1, width: int = 32) -> None:
        super().__init__()
        rows, columns = _quarter(image_size)
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Conv2d(channels + num_classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(_SLOPE),
            nn.Flatten(),
            nn.Linear(2 * width * rows * columns, 1),
        )

    @override
    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits of shape (B, 1)."""
        planes = _one_hot(labels, self.num_classes, images)[:, :, None, None].expand(-1, -1, *images.shape[2:])
        out: Tensor = self.layers(torch.cat([images, planes], dim=1))
        return out


def _hidden_layers(num_inputs: int, hidden: int) -> tuple[nn.Module, ...]:
    return nn.Linear(num_inputs, hidden), nn.LeakyReLU(_SLOPE), nn.Linear(hidden, hidden), nn.LeakyReLU(_SLOPE)


def _quarter(image_size: int) -> tuple[int, int]:
    if image_size < 4 or image_size % 4:
        raise ValueError(
            f"Expected image_size to be a multiple of 4, got image_size={image_size}. Pad or crop the images, or write "
            "a network."
        )
    return image_size // 4, image_size // 4
