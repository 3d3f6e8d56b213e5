"""The models of the step-cost benchmark: each a network, its loss, one batch of random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_dp import fix


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: of the row.
        batch_size: samples a step.
        make_network: the module; its output is logits of shape (B, classes).
        make_inputs: batch size -> inputs.
        num_classes: of the labels.
        time_goal: largest accepted ratio of step times to the same step without privacy.
        memory_goal: largest accepted ratio of peak memory.
        lean_goals: the same two under ``memory="lean"``, where they differ.
        precision: of the Trainer.
        needs_gpu: whether the model is too large for a table made on a CPU.
    """

    name: str
    batch_size: int
    make_network: Callable[[], nn.Module]
    make_inputs: Callable[[int], Tensor]
    num_classes: int
    time_goal: float
    memory_goal: float
    lean_goals: tuple[float, float] | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    needs_gpu: bool = False

    def make_dataset(self, num_batches: int = 8) -> TensorDataset:
        """Return random inputs and labels for a number of batches."""
        size = self.batch_size * num_batches
        return TensorDataset(self.make_inputs(size), torch.randint(self.num_classes, (size,)))


def mlp() -> nn.Module:
    """Return a perceptron, 784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def cnn() -> nn.Module:
    """Return five 3x3 convolutions on 32x32 images, each with GroupNorm and ReLU, and a pooled head."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Attention(nn.Module):
    """Multi-head self-attention from Linear layers; ``rank`` > 0 adds low-rank adapters and freezes the layers."""

    def __init__(self, width: int, heads: int, rank: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.adapters = nn.ModuleList()
        if rank:
            for layer in (self.qkv, self.out):
                layer.requires_grad_(False)
                down = nn.Linear(width, rank, bias=False)
                up = nn.Linear(rank, layer.out_features, bias=False)
                nn.init.zeros_(up.weight)
                self.adapters.append(nn.Sequential(down, up))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x) + (self.adapters[0](x) if self.adapters else 0)
        q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.out(mixed) + (self.adapters[1](mixed) if self.adapters else 0)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, rank)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Encoder classifier; with a rank, only the adapters train."""

    expand_positions = False  # Opacus needs a batch axis in every input

    def __init__(
        self, *, length: int, vocabulary: int = 8000, width: int = 256, depth: int = 4, heads: int = 4, rank: int = 0
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, rank) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)
        if rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("adapters" in name)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        positions = self.positions(places.expand_as(tokens) if self.expand_positions else places)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + positions)).mean(1))


class VisionTransformer(nn.Module):
    """ViT-B/16 in size: 224x224 images, 12 blocks of width 768, 1000 classes."""

    def __init__(self, *, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Embedding((224 // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, heads, 0) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(tokens + positions)).mean(1))


def bert() -> nn.Module:
    """Return a model with the size of BERT-base."""
    return Transformer(length=128, vocabulary=30522, width=768, depth=12, heads=12)


class Recurrent(nn.Module):
    """An LSTM through the layer that can be private, and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = fix(nn.LSTM(64, 128, batch_first=True)).module, nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Bag(nn.Module):
    """A wide embedding, averaged over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(100_000, 64), nn.Linear(64, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tokens(tokens).mean(1))


def words(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    """Return random tokens."""
    return lambda size: torch.randint(vocabulary, (size, length))


def images(side: int) -> Callable[[int], Tensor]:
    """Return random images."""
    return lambda size: torch.randn(size, 3, side, side)


CASES = {
    case.name: case
    for case in (
        Case("mlp", 256, mlp, lambda size: torch.randn(size, 784), 10, 1.4, 1.3),
        Case("cnn", 64, cnn, images(32), 10, 1.4, 1.5),
        Case("transformer", 32, lambda: Transformer(length=128), words(8000, 128), 2, 1.2, 1.6, (1.35, 1.3)),
        Case("lora", 32, lambda: Transformer(length=128, rank=8), words(8000, 128), 2, 1.15, 1.2),
        Case("lstm", 64, Recurrent, lambda size: torch.randn(size, 64, 64), 10, 2.0, 1.5),
        Case("long", 4, lambda: Transformer(length=1024), words(8000, 1024), 2, 1.25, 1.3),
        Case("embedding", 256, Bag, words(100_000, 32), 2, 1.6, 1.5),
        Case("vit", 64, VisionTransformer, images(224), 1000, 1.25, 1.3, precision="bf16-mixed", needs_gpu=True),
        Case("bert", 64, bert, words(30522, 128), 2, 1.25, 1.3, precision="bf16-mixed", needs_gpu=True),
    )
}
