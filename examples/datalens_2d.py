"""A private generator of labelled points: DataLens at epsilon 1 on a mixture of four classes in the plane.

    python examples/datalens_2d.py            # under 90 s on two cores
    python examples/datalens_2d.py --smoke    # a few steps of everything

500 teachers see 20 of the 10,000 points each; only the generator that their noisy votes trained is released. For
comparison, at the same epsilon for the same relation: a DP-GAN, whose discriminator is trained with DPStrategy and
whose generator sees the discriminator only. Both are asked the same question: what does a classifier learn from their
samples about real ones?
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, EpsilonMonitor, PrivacyBudget
from lightning_dp.datalens import DataLens, MLPDiscriminator, MLPGenerator, StepsOver

OUT = Path(__file__).parent / "out"
DELTA = 1e-5
CENTRES = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [-0.6, -0.6], [0.6, -0.6]])
SPREAD = 0.12


class DPGAN(L.LightningModule):
    """A conditional GAN whose discriminator is private and whose generator is post-processing of it."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, *, z_dim: int, num_classes: int, fakes: int, lr: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.z_dim, self.num_classes, self.fakes, self.lr = z_dim, num_classes, fakes, lr

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, labels = batch
        to_generator, to_discriminator = self.optimizers()
        self.toggle_optimizer(to_generator)
        made, asked = self.sample(self.fakes)  # a public number, not the private size of the batch
        to_generator.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.discriminator(made, asked)).mean())
        to_generator.step()
        self.untoggle_optimizer(to_generator)
        made, asked = self.sample(len(real))
        on_real, on_fake = self.discriminator(real, labels), self.discriminator(made.detach(), asked)
        to_discriminator.zero_grad()
        self.manual_backward((nn.functional.softplus(-on_real) + nn.functional.softplus(on_fake)).mean())
        to_discriminator.step()

    def sample(self, num: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(self.num_classes, (num,))
        return self.generator(torch.rand(num, self.z_dim) * 2 - 1, labels), labels

    def configure_optimizers(self) -> list:
        return [torch.optim.Adam(p.parameters(), self.lr, (0.5, 0.999)) for p in (self.generator, self.discriminator)]


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


def train_gan(gan: DPGAN, data: TensorDataset, *, epsilon: float, batch_size: int, epochs: int) -> L.Trainer:
    """Trains a DP-GAN to the same epsilon, for the relation that DataLens is stated in."""
    strategy = DPStrategy(
        target_epsilon=epsilon, target_delta=DELTA, neighboring_relation="replace_one", public_optimizers=[0]
    )
    private = trainer(strategy=strategy, max_epochs=epochs)
    private.fit(gan, DataLoader(data, batch_size=batch_size, shuffle=True))
    return private


def downstream_accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Trains a logistic regression on one set and tests it on another."""
    (x, y), (x_test, y_test) = train, test
    if len(y.unique()) < 2 or not bool(x.isfinite().all()):
        return float((y_test == y[0]).double().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may stop before it has converged
        model = LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())
    return float(model.score(x_test.flatten(1).numpy(), y_test.numpy()))


def points(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labelled points of the mixture; all are in [-1, 1] squared, which is public."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CENTRES), (num,), generator=random)
    return (CENTRES[labels] + SPREAD * torch.randn(num, 2, generator=random)).clamp(-1, 1), labels


def class_accuracy(made: tuple[Tensor, Tensor]) -> float:
    """Share of the samples that are nearest to the centre of the class they were asked to be."""
    return float((torch.cdist(made[0], CENTRES).argmin(1) == made[1]).double().mean())


def describe(name: str, made: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> str:
    features, labels = made
    groups = [features[labels == c] for c in range(len(CENTRES))]
    off = statistics.mean(float((g.mean(0) - c).norm()) for g, c in zip(groups, CENTRES, strict=True))
    spread = statistics.mean(float(g.std(0).mean()) for g in groups)
    return (
        f"{name:22s} right class {class_accuracy(made):.3f}, centres off by {off:.3f}, spread {spread:.3f} (real "
        f"{SPREAD}), trained on it and tested on real points {downstream_accuracy(made, test):.3f}"
    )


def plot(sets: dict[str, tuple[Tensor, Tensor]], target: Path) -> None:
    """Draws every set, a colour a class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(sets), figsize=(4 * len(sets), 4.2), layout="constrained", sharex=True, sharey=True
    )
    for axis, (title, (features, labels)) in zip(axes, sets.items(), strict=True):
        for c, centre in enumerate(CENTRES):
            own = features[labels == c][:400]
            axis.scatter(own[:, 0], own[:, 1], s=5, alpha=0.6, color=f"C{c}", label=f"class {c}")
            axis.plot(*centre, "k+", markersize=12)
        axis.set(title=title, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
    axes[0].legend(loc="center", fontsize=8)
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    OUT.mkdir(exist_ok=True)
    torch.set_num_threads(1)  # many small operations: further threads gain little and suffer where cores are shared
    L.seed_everything(options.seed, verbose=False)  # weights only: the noise cannot be seeded this way
    num_steps, num_epochs = (5, 1) if options.smoke else (400, 25)
    data, test = TensorDataset(*points(10_000, options.seed)), points(4000, options.seed + 1)

    begin = time.perf_counter()
    lens = DataLens(
        MLPGenerator(4, 2, num_classes=4),
        MLPDiscriminator(2, num_classes=4),
        num_teachers=500,
        top_k=1,
        threshold=0.2,
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        z_dim=4,
        num_classes=4,
        batch_size=32,
        alpha=0.05,
        lr=5e-3,
        teacher_lr=5e-3,
        pretrain_steps=20,
    )
    callbacks = [EpsilonMonitor(), PrivacyBudget(options.epsilon)]
    trainer(max_steps=num_steps, callbacks=callbacks).fit(lens, StepsOver(data, steps_per_epoch=100))
    lens_seconds, begin = time.perf_counter() - begin, time.perf_counter()
    print(lens.privacy_statement())

    gan = DPGAN(
        MLPGenerator(4, 2, num_classes=4),
        MLPDiscriminator(2, num_classes=4, hidden=64),
        z_dim=4,
        num_classes=4,
        fakes=256,
        lr=2e-3,
    )
    private = train_gan(gan, data, epsilon=options.epsilon, batch_size=256, epochs=num_epochs)
    gan_seconds = time.perf_counter() - begin
    print(private.strategy.privacy_statement().splitlines()[0])

    made = lens.generate(4000)
    with torch.no_grad():
        made_by_gan = gan.sample(4000)
    lens.save_samples(OUT / "datalens_2d.csv", 1000, columns=["east", "north"])
    plot(
        {
            "real": test,
            f"DataLens, epsilon {lens.epsilon():.2f}": made,
            f"DP-GAN, epsilon {private.strategy.epsilon():.2f}": made_by_gan,
        },
        OUT / "datalens_2d.png",
    )
    print(describe("real", (data.tensors[0], data.tensors[1]), test))
    print(describe(f"DataLens ({lens_seconds:.0f} s)", made, test))
    print(describe(f"DP-GAN ({gan_seconds:.0f} s)", made_by_gan, test))
    print(f"picture: {OUT / 'datalens_2d.png'}\ntable: {OUT / 'datalens_2d.csv'}")
    assert lens.epsilon() <= options.epsilon
    if not options.smoke:
        assert class_accuracy(made) >= 0.9, (
            f"Expected nine samples in ten in their class, got {class_accuracy(made):.3f}."
        )


if __name__ == "__main__":
    main()
