"""Small networks, steps and data, one for each way a module can be written; plain Lightning, without a thought of
privacy.

Shapes coincide where that could mislead: token sequences are as long as the dataset has records, and so as long as the
batch when every record is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.strategies.tasks import NUM_CLASSES, NUM_FEATURES, NUM_TOKENS, VOCABULARY, WIDTH, Task

# ---------------------------------------------------------------- networks


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def pooled(axis: int = 1) -> nn.Module:
    return Apply(lambda x: (x[0] if isinstance(x, tuple) else x).mean(axis))


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, WIDTH), *(middle or (nn.Tanh(),)), nn.Linear(WIDTH, NUM_CLASSES))


def convolutional(axes: int, *, norm: nn.Module | None = None, **options: Any) -> nn.Module:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    head = [Apply(lambda x: x.flatten(2).mean(2)), nn.Linear(4, NUM_CLASSES)]
    return nn.Sequential(layer(2, 4, 3, **options), norm or nn.Identity(), nn.ReLU(inplace=True), *head)


def over_tokens(*middle: nn.Module, axis: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH, padding_idx=0), *middle, pooled(axis), nn.Linear(WIDTH, NUM_CLASSES)
    )


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, **{"dropout": 0.0, **options})


def along(batch_first: bool, *layers: nn.Module) -> list[nn.Module]:
    """The layers, with (T, B, ...) before them where they want the batch second."""
    return [*layers] if batch_first else [Apply(lambda x: x.transpose(0, 1)), *layers]


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    first = options.get("batch_first", False)
    width = WIDTH * (2 if options.get("bidirectional") else 1)
    return nn.Sequential(*along(first, kind(4, WIDTH, **options)), pooled(int(first)), nn.Linear(width, NUM_CLASSES))


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x, x, x, need_weights=False)[0]


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.head = nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.tower(left).tanh() - self.tower(input=right).tanh()).abs())


class Recurrent(nn.Module):
    """One cell, called once a time step; the time axis of the input is the second."""

    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.cell = cell or Apply(lambda x, h: torch.tanh(self.step(torch.cat([x, h], 1))))
        self.step = nn.Linear(2 + WIDTH, WIDTH) if cell is None else nn.Identity()
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden)
        return self.head(hidden)


class Adapted(nn.Module):
    """A frozen layer with a trainable product of two thin ones added to it, as LoRA has."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(NUM_FEATURES, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(NUM_FEATURES, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.frozen(x) + 0.5 * self.b(self.a(x))).tanh())


class Positions(nn.Module):
    """Adds embeddings of the positions, given as (T,) or as (1, T)."""

    def __init__(self, *, leading: bool) -> None:
        super().__init__()
        self.leading, self.table = leading, nn.Embedding(NUM_TOKENS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1], device=x.device)
        return x + self.table(ids[None] if self.leading else ids)


class RootMeanSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class SelfTaught(Task):
    """Forwards that no backward follows: a detached branch, and a target of its own computed without gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        with torch.no_grad():
            wanted = self(x.flip(1))
        self(x).detach_()
        return F.cross_entropy(self(x), targets) + (self(x) - wanted).square().mean()


class Listed(nn.Module):
    """Weights in a list and a dictionary, used by the module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(NUM_FEATURES, WIDTH), torch.randn(WIDTH, NUM_CLASSES)])
        self.more = nn.ParameterDict({"bias": torch.zeros(1, NUM_CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weights[0]).tanh() @ self.weights[1] + self.more["bias"]


class Scaled(nn.Module):
    """A residual branch with a LayerScale, of shape (D,), and a scalar gain."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch, self.gamma, self.gain = (
            branch,
            nn.Parameter(torch.full((WIDTH,), 0.3)),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.gamma * self.branch(x)


class VisionTransformer(nn.Module):
    """Patches, a bare class token and position table, LayerScale, a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        attention = encoder_layer(batch_first=True, norm_first=True)
        self.body = nn.Sequential(
            attention, Scaled(nn.Sequential(RootMeanSquare(), nn.Linear(WIDTH, WIDTH), nn.GELU()))
        )
        self.norm, self.head = RootMeanSquare(), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.body(x)[:, 0]))


class CausalLM(nn.Module):
    """One matrix embeds the tokens and gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions, self.mix = Positions(leading=True), nn.Linear(WIDTH, WIDTH)
        self.logits = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.logits.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(self.embed(ids))
        return self.logits(self.mix(x.cumsum(1)).tanh())


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.head = nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), RootMeanSquare())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


class Mixer(nn.Module):
    """Linear over the features, then over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.places = nn.Linear(4, 4), nn.Linear(NUM_TOKENS, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.places(self.channels(x).tanh().mT).mean(1)


class Experts(nn.Module):
    """Gated experts, weighed by each record itself; one of them is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.unused = nn.Linear(NUM_FEATURES, 2), nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.experts = nn.ModuleList(nn.Linear(NUM_FEATURES, NUM_CLASSES) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("be,ebc->bc", self.gate(x).softmax(1), torch.stack([e(x) for e in self.experts]))


class Functional(nn.Module):
    """Reads a weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.inner.weight).tanh())


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = (ids > 0).sum(1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.lstm(packed)[1][0][-1])
