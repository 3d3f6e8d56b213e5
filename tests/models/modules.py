"""LightningModules around other people's networks, and records for them; nothing here knows of privacy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_dp

NUM_RECORDS, NUM_TOKENS, VOCABULARY, NUM_CLASSES = 8, 6, 32, 3
Record = dict[str, Tensor]


# ---------------------------------------------------------------- data


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def text() -> list[Record]:
    """Sentences of 2 to 6 tokens, filled up and masked, as a tokenizer returns them."""
    source, records = generator(), []
    for i in range(NUM_RECORDS):
        mask = (torch.arange(NUM_TOKENS) < 2 + i % (NUM_TOKENS - 1)).long()
        ids = torch.randint(1, VOCABULARY, (NUM_TOKENS,), generator=source) * mask
        records.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % NUM_CLASSES)})
    return records


def continuations() -> list[Record]:
    """The same sentences for a model that computes its own next-token loss; what is filled up does not count."""
    return [
        {**record, "labels": record["input_ids"].masked_fill(record["attention_mask"] == 0, -100)} for record in text()
    ]


def images(size: int, channels: int = 3) -> list[Record]:
    """Images of growing contrast, so that some gradients are clipped and some are not."""
    source = generator()
    return [
        {
            "pixel_values": torch.randn(channels, size, size, generator=source) * (0.3 + 0.4 * i),
            "labels": torch.tensor(i % NUM_CLASSES),
        }
        for i in range(NUM_RECORDS)
    ]


def series() -> list[Record]:
    source = generator()
    return [{"series": torch.randn(9, 2, generator=source) * (0.2 + 0.3 * i)} for i in range(NUM_RECORDS)]


def speech() -> list[Record]:
    """Spectra of growing loudness with the words spoken."""
    source = generator()
    return [
        {
            "input_features": torch.randn(8, 16, generator=source) * (0.3 + 0.4 * i),
            "labels": torch.randint(3, VOCABULARY, (NUM_TOKENS,), generator=source),
        }
        for i in range(NUM_RECORDS)
    ]


def past_and_future() -> list[Record]:
    """Two channels of a series, and what follows."""
    source = generator()
    return [
        {
            "past_values": torch.randn(16, 2, generator=source) * (0.3 + 0.4 * i),
            "future_values": torch.randn(4, 2, generator=source),
        }
        for i in range(NUM_RECORDS)
    ]


def visits() -> list[Record]:
    """A user's history of five items, an item, and whether it was chosen; records of unequal weight."""
    source = generator()
    return [
        {
            "history": torch.randint(VOCABULARY, (5,), generator=source),
            "item": torch.randint(VOCABULARY, (), generator=source),
            "features": torch.randn(4, generator=source) * (0.2 + i),
            "clicked": torch.tensor(float(i % 2)),
        }
        for i in range(NUM_RECORDS)
    ]


def pairs() -> list[Record]:
    """An image with its caption."""
    return [
        {**{k: v for k, v in words.items() if k != "labels"}, "pixel_values": image["pixel_values"]}
        for words, image in zip(text(), images(16), strict=True)
    ]


def choices() -> list[Record]:
    """An image with three captions of its own, the first of them right."""
    source, ids = generator(), text()
    order = [torch.randperm(NUM_RECORDS, generator=source)[:3] for _ in range(NUM_RECORDS)]
    return [
        {
            "pixel_values": image["pixel_values"],
            "input_ids": torch.stack([ids[int(i)]["input_ids"] for i in chosen]),
            "attention_mask": torch.stack([ids[int(i)]["attention_mask"] for i in chosen]),
        }
        for image, chosen in zip(images(16), order, strict=True)
    ]


# ---------------------------------------------------------------- steps


class FineTuning(L.LightningModule):
    """A Hugging Face model that computes its own loss from a batch of keyword arguments."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class NextToken(FineTuning):
    """Each sequence's loss is the mean over its own tokens: shape (B,)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none") * mask[:, 1:]
        return losses.sum(1) / mask[:, 1:].sum(1)


class Denoising(FineTuning):
    """An encoder-decoder that says its input again; the loss has shape (B,)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
        return (F.cross_entropy(logits.mT, ids, reduction="none") * mask).sum(1) / mask.sum(1)


class Captions(FineTuning):
    """CLIP's own loss: every image against every caption of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch, return_loss=True).loss


class OwnCaptions(FineTuning):
    """The same model, each image against the captions of its own record."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        image = self.model.get_image_features(pixel_values=batch["pixel_values"])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        captions = self.model.get_text_features(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1))
        image, captions = (getattr(out, "pooler_output", out) for out in (image, captions))
        captions = captions.unflatten(0, ids.shape[:2])
        scores = F.cosine_similarity(image[:, None], captions, dim=2) / 0.1
        return F.cross_entropy(scores, torch.zeros_like(ids[:, 0, 0]))


class Forecast(L.LightningModule):
    """The next value of a series from a GRU's states; the loss is an L1 mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head, self.lr = nn.GRU(2, 8, num_layers=2, batch_first=True), nn.Linear(8, 2), 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        states, _ = self.gru(batch["series"][:, :-1])
        return F.l1_loss(self.head(states), batch["series"][:, 1:])

    configure_optimizers = FineTuning.configure_optimizers


class ImageAutoencoder(L.LightningModule):
    """Convolutions down, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(128, 4)
        )
        self.decoder = nn.Sequential(
            nn.Linear(4, 128), nn.ReLU(inplace=True), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 3, 2, stride=2)
        )
        self.lr = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        image = batch["pixel_values"]
        return F.mse_loss(self.decoder(self.encoder(image)), image)

    configure_optimizers = FineTuning.configure_optimizers


class TwoTowers(L.LightningModule):
    """A user's and an item's tower with tied tables of items; the loss is a record's own, with its own label."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(VOCABULARY, 8)
        self.user = nn.Sequential(nn.Linear(8 + 4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.item = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8))
        self.item[0].weight = self.items.weight
        self.lr = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        history = self.items(batch["history"]).mean(1)
        user = self.user(torch.cat([history, batch["features"]], dim=1))
        score = (user * self.item(batch["item"])).sum(1)
        return F.binary_cross_entropy_with_logits(score, batch["clicked"])

    configure_optimizers = FineTuning.configure_optimizers


class DCGAN(L.LightningModule):
    """Convolutional generator and discriminator, stepped by hand; the generator never sees the data."""

    num_fakes = 4

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 4), nn.BatchNorm2d(8), nn.ReLU(True), nn.ConvTranspose2d(8, 3, 2, stride=2)
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=2), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, True), nn.Conv2d(8, 1, 3), nn.Flatten(0)
        )

    def fakes(self, number: int) -> Tensor:
        return self.generator(torch.randn(number, 4, 1, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch["pixel_values"]
        of_generator, of_discriminator = self.optimizers()
        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(self.fakes(self.num_fakes))).mean())
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        fake = self.fakes(len(real)).detach()
        of_discriminator.zero_grad()
        self.manual_backward((F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake))).mean())
        of_discriminator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]


def fixed(module: L.LightningModule) -> L.LightningModule:
    result = lightning_dp.fix(module).module
    assert isinstance(result, L.LightningModule)
    return result


def vision(model: type[Any], config: Any) -> Callable[[], L.LightningModule]:
    return lambda: FineTuning(model(config))
