"""Small steps and data, one for each way a training step can be written; plain Lightning without thought of privacy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

NUM_SAMPLES = NUM_TOKENS = 8
NUM_FEATURES, WIDTH, NUM_CLASSES, VOCABULARY = 6, 8, 3, 11


# ---------------------------------------------------------------- data


def labels() -> Tensor:
    return torch.arange(NUM_SAMPLES) % NUM_CLASSES


def features(*shape: int) -> Tensor:
    """Records of different sizes, so that some gradients are clipped and some are not."""
    x = torch.randn(NUM_SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.3, 3.0, NUM_SAMPLES).reshape(-1, *[1] * len(shape))


def records(*shape: int) -> Dataset:
    return TensorDataset(features(*shape), labels())


def token_ids() -> Tensor:
    """Sequences that are longer from record to record; 0 fills them up."""
    ids = torch.randint(1, VOCABULARY, (NUM_SAMPLES, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    return ids * (torch.arange(NUM_TOKENS) <= torch.arange(NUM_SAMPLES)[:, None])


# ---------------------------------------------------------------- steps


class Task(L.LightningModule):
    """Cross-entropy of a network's output."""

    def __init__(self, network: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        *inputs, targets = batch
        return F.cross_entropy(self(*inputs), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class SumOfLosses(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class LanguageModel(Task):
    """Next token; each sequence's loss is the mean over its own tokens: shape (B,)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids = batch[0]
        losses = F.cross_entropy(self(ids)[:, :-1].mT, ids[:, 1:], ignore_index=0, reduction="none")
        return losses.sum(1) / (ids[:, 1:] > 0).sum(1).clamp_min(1)


class Autoencoder(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]), batch[0])


class VariationalAutoencoder(L.LightningModule):
    """Draws its latent code in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.lr = nn.Linear(NUM_FEATURES, 4), nn.Linear(2, NUM_FEATURES), 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean, log_var = self.encoder(batch[0]).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        error = (self.decoder(code) - batch[0]).square().sum(1)
        return {"loss": (error + 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(1)).mean()}

    configure_optimizers = Task.configure_optimizers


class DictBatch(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])


class NestedBatch(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (left, right), more = batch["inputs"]
        return F.cross_entropy(self(left + right * more["scale"][:, None]), batch["y"])


class Views(Task):
    """K views of one record, folded into the batch: one record counts once."""

    def __init__(self, network: nn.Module, *, view_major: bool) -> None:
        super().__init__(network)
        self.view_major = view_major

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views, targets = batch
        folded = (views.transpose(0, 1) if self.view_major else views).flatten(0, 1)
        k = views.shape[1]
        return F.cross_entropy(self(folded), targets.repeat(k) if self.view_major else targets.repeat_interleave(k))


class OwnScale(Task):
    """A parameter of the LightningModule itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs) * self.temperature
