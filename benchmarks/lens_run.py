"""One run of the DataLens benchmark: train, generate, judge."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks import data
from benchmarks.averages import accuracy
from benchmarks.prototypes import SIZE, Z_DIM, Matching, Prototypes, coarse_cnn, coarse_split
from lightning_dp.datalens import DataLens, StepsOver

DELTA, SEARCH_SEED, SAMPLES, STEPS = 1e-5, 100, 10_000, 20
SEEDS = (0, 1, 2)  # of the reported runs
PIXELS = SIZE * SIZE


@dataclass(frozen=True)
class Lens:
    """One run of DataLens.

    Args:
        data: "mnist" or "fashion_mnist".
        epsilon: for the whole run.
        splits: a class has two to this power kinds, with one prototype each.
        num_teachers: shards of the data.
        votes: votes of a teacher per prototype in expectation.
        gain: pixel of a prototype on which all noisy votes agree.
        moves: of ``Prototypes``.
        noise: of ``Prototypes``.
        weighted: images come from kinds by ``drawn``, else from all kinds alike.
        report: judged on the test images, else on the last training images, which no teacher sees.
        seed: of shards, z and labels; noise is not seeded.
    """

    data: str
    epsilon: float
    splits: int
    num_teachers: int
    votes: int
    gain: float
    moves: float
    noise: float
    weighted: bool = False
    report: bool = False
    seed: int = SEARCH_SEED
    title: ClassVar[str] = "DataLens"

    @property
    def kind(self) -> int:
        """Number of splits, in the names of files."""
        return self.splits

    @property
    def labels(self) -> int:
        """Number of prototypes."""
        return 10 << self.splits


def samples_file(run: Any) -> Path:
    """Return the path of the cached samples of a run, for the picture."""
    return data.cache_folder() / "generated" / f"{run.data}-{run.epsilon}-{run.kind}-{run.report}-{run.seed}.pt"


def keep_samples(run: Any, made: tuple[Tensor, Tensor]) -> None:
    """Cache the first generated images and their labels."""
    samples_file(run).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tuple(part[:400].clone() for part in made), samples_file(run))


def judged(made: tuple[Tensor, Tensor], held_out: TensorDataset) -> dict[str, float]:
    """Return the accuracy on real images of two classifiers that learn from generated ones."""
    (images, labels), (x_test, y_test) = made, held_out.tensors
    linear = LogisticRegression(max_iter=60, C=0.01).fit(images.flatten(1).numpy(), labels.numpy())
    network = coarse_cnn()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(3):
        for part in torch.randperm(len(labels)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(images[part]), labels[part]).backward()
            optimizer.step()
    return {
        "linear": float(linear.score(x_test.flatten(1).numpy(), y_test.numpy())),
        "cnn": accuracy(network, held_out),
    }


def lens_of(run: Lens, shard_size: int) -> DataLens:
    """Return the model of a run: ``STEPS`` steps, in which each prototype gets its votes."""
    return DataLens(
        Prototypes(run.labels, moves=run.moves, noise=run.noise),
        Matching(run.labels),
        num_teachers=run.num_teachers,
        top_k=PIXELS,
        target_epsilon=run.epsilon,
        target_delta=DELTA,
        z_dim=Z_DIM,
        num_classes=run.labels,
        batch_size=run.labels * run.votes // STEPS,
        alpha=1.0,
        # the mean squared error divides by all pixels of a batch: with this rate a prototype adds up gain / votes
        # times the sign of each of its noisy sums
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=run.gain * run.labels * PIXELS / (2 * STEPS)),
        d_steps=1,
        pretrain_steps=1,
        teacher_batch_size=shard_size,
        public_seed=run.seed,
        teacher_chunk_size=50,
    )


def drawn(run: Lens, coefficients: Tensor) -> Tensor:
    """Draw kinds for the samples: classes alike, kinds of a class by how far their prototype is above the noise.

    A sum of ``votes`` random signs gives each coefficient the variance gain^2 / votes; a kind with three times this or
    less is left out. This looks at the released generator only.
    """
    power = coefficients.detach().pow(2).mean((1, 2)) - 3 * run.gain**2 / run.votes
    shares = power.clamp(min=1e-6).view(10, -1)
    classes = torch.randint(10, (SAMPLES,))
    return (classes << run.splits) + torch.multinomial(shares[classes], 1)[:, 0]


def execute(run: Lens) -> dict[str, Any]:
    """Train, generate, judge."""
    began, work = time.perf_counter(), time.process_time()
    split = coarse_split(run.data, run.splits, report=run.report)
    torch.manual_seed(run.seed)
    lens = lens_of(run, len(split.train) // run.num_teachers)
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lens, StepsOver(split.train, steps_per_epoch=STEPS))
    images, kinds = lens.generate(SAMPLES, drawn(run, lens.generator.coefficients) if run.weighted else None)
    made = images, kinds >> run.splits
    keep_samples(run, made)
    return {
        **judged(made, split.held_out),
        "spent": round(lens.epsilon(), 4),
        "noise_std": round(lens.plan.noise_std, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - work, 1),
    }
