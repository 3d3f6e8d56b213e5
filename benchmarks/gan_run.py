"""One run of a private GAN, the rival of DataLens: train, generate, judge.

Images are the same 14 x 14 pixels, labels are conditions, and the generator has the same 8 x 8 cosine coefficients as
that of DataLens. Only the step of the discriminator sees records, so only its optimizer is private; the generator
learns from the discriminator's released weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus
from torch.nn.utils import vector_to_parameters
from torch.utils.data import DataLoader

from benchmarks import prototypes
from benchmarks.averages import Averages
from benchmarks.lens_run import DELTA, SAMPLES, SEARCH_SEED, judged, keep_samples
from benchmarks.prototypes import COEFFICIENTS, coarse_split, cosines
from lightning_dp import DPStrategy

Z_DIM, FAKES, HIDDEN = 16, 200, 128
AVERAGE = 0.99  # decay per step of the averaged weights, which generate


@dataclass(frozen=True)
class Gan:
    """One run of the private GAN.

    Args:
        data: "mnist" or "fashion_mnist".
        epsilon: for the whole run.
        epochs: passes over the records in expectation.
        batch: expected number of records per step of the discriminator.
        every: steps of the discriminator per step of the generator.
        lr: rate of the discriminator's Adam.
        generator_lr: rate of the generator's Adam.
        clip: bound on the norm of one record's gradient.
        width: hidden units of the discriminator.
        report: judged on the test images, else on the last training images, which are not trained on.
        seed: of the initial weights and of the random numbers of the generator; sampling and noise are not seeded.
        moves: how far generated images are moved, and
        noise: size of the smooth noise on them, as for ``Prototypes``; with 0 images are left as they are.
    """

    data: str
    epsilon: float
    epochs: int
    batch: int
    every: int
    lr: float
    generator_lr: float
    clip: float
    width: int
    report: bool = False
    seed: int = SEARCH_SEED
    moves: float = 0.0
    noise: float = 0.0

    @property
    def title(self) -> str:
        """Name of the method in the picture."""
        return "GAN, moved" if self.moves else "GAN"

    @property
    def kind(self) -> str:
        """Name of the method in the names of files."""
        return "gan-moved" if self.moves else "gan"


#: Setting that the search begins with, and the values of each number in the order in which they are tried.
START = Gan("mnist", 1.0, 12, 600, 2, 2e-3, 1e-3, 1.0, 128)
GRIDS: dict[str, tuple[float, ...]] = {
    "every": (2, 1, 5),
    "generator_lr": (1e-3, 5e-4, 2e-3),
    "lr": (2e-3, 1e-3, 4e-3),
    "clip": (1.0, 0.3),
    "batch": (600, 1200),
    "epochs": (12, 24),
}


class ConditionalGan(L.LightningModule):
    """Two perceptrons, stepped by hand; the discriminator has one output per class, and the label picks it.

    Args:
        run: its description.
    """

    waves: Tensor

    def __init__(self, run: Gan) -> None:
        super().__init__()
        self.automatic_optimization, self.run = False, run
        self.register_buffer("waves", cosines(COEFFICIENTS))
        self.generator = nn.Sequential(
            *(nn.Linear(Z_DIM + 10, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, COEFFICIENTS**2), nn.Unflatten(1, (COEFFICIENTS, COEFFICIENTS))),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(COEFFICIENTS**2, run.width), nn.LeakyReLU(0.2), nn.Linear(run.width, 10)
        )

    def forward(self, labels: Tensor) -> Tensor:
        """Images of shape (B, 1, 14, 14)."""
        z = torch.randn(len(labels), Z_DIM)
        coefficients = self.generator(torch.cat([z, one_hot(labels, 10).float()], 1))
        return torch.tanh(self.waves.T @ coefficients @ self.waves)[:, None]

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits of shape (B,): how real images look for their labels."""
        scores = self.discriminator(self.waves @ (images[:, 0] + 1) @ self.waves.T)
        return (scores * one_hot(labels, 10).float()).sum(1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, labels = batch
        of_generator, of_discriminator = self.optimizers()
        if batch_idx % self.run.every == 0:  # no record is used here
            wanted = torch.arange(FAKES) % 10
            self.toggle_optimizer(of_generator)
            of_generator.zero_grad()
            self.manual_backward(softplus(-self.logits(self(wanted), wanted)).mean())
            of_generator.step()
            self.untoggle_optimizer(of_generator)
        fakes = self(labels).detach()  # one per record, which counts as part of its record
        of_discriminator.zero_grad()
        self.manual_backward((softplus(-self.logits(real, labels)) + softplus(self.logits(fakes, labels))).mean())
        of_discriminator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, self.run.generator_lr), (self.discriminator, self.run.lr)
        return [torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.9)) for part, lr in parts]


def execute(run: Gan) -> dict[str, Any]:
    """Train, generate, judge."""
    began, work = time.perf_counter(), time.process_time()
    split = coarse_split(run.data, 0, report=run.report)
    torch.manual_seed(run.seed)
    module = ConditionalGan(run)
    strategy = DPStrategy(
        target_epsilon=run.epsilon,
        target_delta=DELTA,
        neighboring_relation="replace_one",
        max_grad_norm=run.clip,
        public_optimizers=[0],
    )
    averages = Averages([AVERAGE])
    trainer = L.Trainer(
        max_epochs=run.epochs,
        strategy=strategy,
        callbacks=[averages],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(split.train, batch_size=run.batch, shuffle=True))
    with torch.no_grad():
        vector_to_parameters(averages.weights[AVERAGE], module.parameters())
        labels = torch.arange(SAMPLES) % 10
        images = module(labels)
        if run.moves:
            z = 2 * torch.rand(SAMPLES, prototypes.Z_DIM) - 1
            images = prototypes.Prototypes(10, moves=run.moves, noise=run.noise).varied(images, z)
    made = images, labels
    keep_samples(run, made)
    return {
        **judged(made, split.held_out),
        "spent": round(strategy.epsilon(), 4),
        "sigma": round(strategy.plan.noise_multiplier, 4),
        "steps": strategy.plan.steps,
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - work, 1),
    }
