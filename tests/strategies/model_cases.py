"""``CASES``, the table that the tests of modules run over: name -> module, dataset, options of the strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import lightning_dp
from tests.strategies.models import (
    Adapted,
    Apply,
    Attention,
    CausalLM,
    Checkpointed,
    Experts,
    Functional,
    Listed,
    Mixer,
    Packed,
    Positions,
    Recurrent,
    RootMeanSquare,
    SelfTaught,
    Siamese,
    VisionTransformer,
    along,
    convolutional,
    encoder_layer,
    mlp,
    over_tokens,
    pooled,
    recurrent,
)
from tests.strategies.tasks import (
    NUM_CLASSES,
    NUM_FEATURES,
    NUM_TOKENS,
    VOCABULARY,
    WIDTH,
    Autoencoder,
    DictBatch,
    LanguageModel,
    NestedBatch,
    OwnScale,
    SumOfLosses,
    Task,
    VariationalAutoencoder,
    Views,
    features,
    labels,
    records,
    token_ids,
)


def tokens() -> Dataset:
    return TensorDataset(token_ids(), labels())


class Case(NamedTuple):
    """A module, made for each test, with its dataset and the arguments of its strategy."""

    module: Callable[[], L.LightningModule]
    dataset: Callable[[], Any]
    options: dict[str, Any] = {}  # noqa: RUF012  never changed


def classifier(network: Callable[[], nn.Module], dataset: Callable[[], Any]) -> Case:
    return Case(lambda: Task(network()), dataset)


def fixed(network: Callable[[], nn.Module], dataset: Callable[[], Any]) -> Case:
    return Case(lambda: lightning_dp.fix(Task(network())).module, dataset)  # type: ignore[return-value]


def vectors() -> Dataset:
    return records(NUM_FEATURES)


def unlabelled() -> Dataset:
    return TensorDataset(features(NUM_FEATURES))


def dictionaries() -> Dataset:
    return [{"x": x, "y": y} for x, y in zip(features(NUM_FEATURES), labels(), strict=True)]  # type: ignore[return-value]


def nested() -> Dataset:
    pairs = zip(features(NUM_FEATURES), features(NUM_FEATURES).flip(0), labels(), strict=True)
    return [{"inputs": ((a, b), {"scale": a.sum()}), "y": y} for a, b, y in pairs]  # type: ignore[return-value]


class OneByOne(nn.Module):
    """Calls its layer once for each record."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


CASES: dict[str, Case] = {
    "linear": classifier(lambda: nn.Linear(NUM_FEATURES, NUM_CLASSES), vectors),
    "a call for each record": classifier(OneByOne, vectors),
    "in-place activation after the first layer": classifier(lambda: mlp(nn.ReLU(inplace=True)), vectors),
    "layer norm": classifier(lambda: mlp(nn.LayerNorm(WIDTH), nn.GELU()), vectors),
    "RMS norm": classifier(lambda: mlp(nn.RMSNorm(WIDTH), nn.GELU()), vectors),
    "group norm": classifier(lambda: mlp(nn.GroupNorm(2, WIDTH), nn.GELU()), vectors),
    "PReLU": classifier(lambda: mlp(nn.PReLU()), vectors),
    "bilinear": classifier(
        lambda: nn.Bilinear(NUM_FEATURES, 4, NUM_CLASSES),
        lambda: TensorDataset(features(NUM_FEATURES), features(4), labels()),
    ),
    **{
        f"convolution {axes}d": classifier(lambda a=axes: convolutional(a), lambda s=shape: records(*s))
        for axes, shape in ((1, (2, 8)), (2, (2, 6, 6)), (3, (2, 4, 4, 4)))
    },
    **{
        f"convolution {options}": classifier(lambda o=options: convolutional(2, **o), lambda: records(2, 7, 7))
        for options in (
            {"groups": 2, "stride": 2},
            {"dilation": 2, "padding": "same"},
            *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        )
    },
    "transposed convolution": classifier(
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.ReLU(inplace=True), pooled(3), pooled(2)),
        lambda: records(2, 4, 4),
    ),
    "instance norm": classifier(
        lambda: convolutional(2, norm=nn.InstanceNorm2d(4, affine=True)), lambda: records(2, 6, 6)
    ),
    "embedding": classifier(over_tokens, tokens),
    "embedding bag": classifier(lambda: nn.EmbeddingBag(VOCABULARY, NUM_CLASSES, mode="sum"), tokens),
    "embedded positions (T,)": classifier(lambda: over_tokens(Positions(leading=False), RootMeanSquare()), tokens),
    "embedded positions (1, T)": classifier(lambda: over_tokens(Positions(leading=True), nn.LayerNorm(WIDTH)), tokens),
    "vision transformer": classifier(VisionTransformer, lambda: records(1, 4, 4)),
    "mixer": classifier(Mixer, lambda: records(NUM_TOKENS, 4)),
    **{
        f"{kind.__name__} {options}": fixed(lambda k=kind, o=options: recurrent(k, **o), lambda: records(NUM_TOKENS, 4))
        for kind, options in (
            (nn.LSTM, {"batch_first": True}),
            (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
            (nn.GRU, {"batch_first": True}),
            (nn.GRU, {}),
            (nn.RNN, {"batch_first": True}),
        )
    },
    **{
        f"attention, batch_first={first}{', fixed' * (make is fixed)}": make(
            lambda f=first: over_tokens(*along(f, Attention(f)), axis=int(f)), tokens
        )
        for first in (True, False)
        for make in (classifier, fixed)
    },
    **{
        f"encoder layer, batch_first={first}{', fixed' * (make is fixed)}": make(
            lambda f=first: over_tokens(*along(f, encoder_layer(batch_first=f)), axis=int(f)), tokens
        )
        for first in (True, False)
        for make in (classifier, fixed)
    },
    "encoder layer with dropout, fixed": fixed(
        lambda: over_tokens(encoder_layer(batch_first=True, dropout=0.2, activation="gelu")), tokens
    ),
    **{
        f"{kind.__name__} {options}, as it is": classifier(
            lambda k=kind, o=options: recurrent(k, **o), lambda: records(NUM_TOKENS, 4)
        )
        for kind, options in (
            (nn.LSTM, {"batch_first": True}),
            (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
            (nn.GRU, {"batch_first": True}),
            (nn.RNN, {}),
        )
    },
    "packed sequences": classifier(Packed, tokens),
    "encoder layer with dropout": classifier(
        lambda: over_tokens(encoder_layer(batch_first=True, dropout=0.2, activation="gelu")), tokens
    ),
    "weight read": classifier(Functional, vectors),
    **{
        f"{wrap.__name__}, {'hooks' if wrap.__module__.endswith('weight_norm') else 'parametrization'}": classifier(
            lambda w=wrap: mlp(w(nn.Linear(WIDTH, WIDTH)), nn.Tanh()), vectors
        )
        for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal)
    },
    "batch second": classifier(
        lambda: over_tokens(*along(False, nn.Linear(WIDTH, WIDTH), nn.ReLU(True)), axis=0), tokens
    ),
    "tied language model": Case(lambda: LanguageModel(CausalLM()), tokens),
    "siamese": classifier(Siamese, lambda: TensorDataset(features(6), features(6).flip(1), labels())),
    "recurrent cell": classifier(Recurrent, lambda: records(5, 2)),
    "GRU cell": classifier(lambda: Recurrent(nn.GRUCell(2, WIDTH)), lambda: records(5, 2)),
    "frozen layers": classifier(lambda: mlp(nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Tanh()), vectors),
    "adapters": classifier(Adapted, vectors),
    "experts": classifier(Experts, vectors),
    "forwards without a backward": Case(lambda: SelfTaught(mlp()), vectors),
    "lists of parameters": classifier(Listed, vectors),
    "functional dropout": classifier(lambda: mlp(Apply(lambda x: F.dropout(x, 0.4)), nn.Tanh()), vectors),
    "dropout": classifier(lambda: mlp(nn.Dropout(0.4), nn.Tanh()), vectors),
    "dropout in place": classifier(lambda: mlp(nn.Dropout(0.4, inplace=True), nn.Tanh()), vectors),
    "checkpointing, reentrant": classifier(lambda: Checkpointed(use_reentrant=True), vectors),
    "checkpointing": classifier(lambda: Checkpointed(use_reentrant=False), vectors),
    "autoencoder": Case(lambda: Autoencoder(nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 6))), unlabelled),
    "variational autoencoder": Case(VariationalAutoencoder, unlabelled),
    "own parameter": Case(lambda: OwnScale(mlp()), vectors),
    "own parameter in a language model": Case(lambda: LanguageModel(nn.Sequential(OwnScale(CausalLM()))), tokens),
    "dictionaries": Case(lambda: DictBatch(mlp()), dictionaries),
    "nested batch": Case(lambda: NestedBatch(mlp()), nested),
    "views": Case(lambda: Views(mlp(nn.LayerNorm(WIDTH)), view_major=False), lambda: records(3, NUM_FEATURES)),
    "views, view-major": Case(lambda: Views(mlp(RootMeanSquare()), view_major=True), lambda: records(3, NUM_FEATURES)),
    "sum of losses": Case(lambda: SumOfLosses(mlp()), vectors, {"loss_reduction": "sum"}),
}
