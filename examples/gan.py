"""A GAN under privacy: only the discriminator sees data, so only its optimizer is private; the generator learns from
it.

    python examples/gan.py            # about half a minute
    python examples/gan.py --smoke    # a few steps

``public_optimizers=[0]`` says that the generator's optimizer is never fed by the data (checked at the first batch).
What the generator makes is post-processing of noisy releases: pictures may be published, as many as you like, at the
same epsilon. 1400 steps at epsilon 10 buy noisy pictures whose means resemble the digits', not pictures that pass for
digits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy

OUT = Path(__file__).parent / "out" / "gan"
NOISE, FAKES = 10, 130


class GAN(L.LightningModule):
    """Two small perceptrons that see the digit, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(NOISE + 10, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
        self.discriminator = nn.Sequential(nn.Linear(64 + 10, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def forward(self, digits: Tensor) -> Tensor:
        told = one_hot(digits, 10).float()
        return self.generator(torch.cat([torch.randn(len(digits), NOISE, device=self.device), told], dim=1))

    def judge(self, images: Tensor, digits: Tensor) -> Tensor:
        return self.discriminator(torch.cat([images, one_hot(digits, 10).float()], dim=1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        real, digits = batch
        of_generator, of_discriminator = self.optimizers()
        # the generator's step: a fixed number of fakes of every digit, no data
        wanted = torch.arange(FAKES, device=self.device) % 10
        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(softplus(-self.judge(self(wanted), wanted)).mean())
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        # the discriminator's step: each record with one fake of its own
        fake = self(digits).detach()
        of_discriminator.zero_grad()
        self.manual_backward((softplus(-self.judge(real, digits)) + softplus(self.judge(fake, digits))).mean())
        of_discriminator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.generator, 2e-3), (self.discriminator, 3e-3)
        return [torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.9)) for part, lr in parts]


def agreement(fakes: Tensor, digits: Tensor, real: Tensor, real_digits: Tensor) -> float:
    """Correlation of the ten mean digits, less their mean, with those of the data; an un-noised evaluation."""

    def means(images: Tensor, labels: Tensor) -> Tensor:
        means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
        return (means - means.mean(0)).flatten()

    return float(torch.corrcoef(torch.stack([means(fakes, digits), means(real, real_digits)]))[0, 1])


def draw(fakes: Tensor, target: Path) -> None:
    """Writes a sheet of five rows of the ten digits."""
    from matplotlib import image

    sheet = fakes[:50].reshape(5, 10, 8, 8).transpose(1, 2).reshape(40, 80)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.imsave(target, torch.kron(sheet, torch.ones(6, 6)).numpy(), cmap="gray", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="five epochs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the data is in memory
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)  # weights only: the noise cannot be seeded this way

    data = load_digits()
    real, labels = torch.as_tensor(data.data / 16.0).float(), torch.as_tensor(data.target)
    strategy = DPStrategy(target_epsilon=10.0, target_delta=1e-5, clipping="automatic", public_optimizers=[0])
    trainer = L.Trainer(
        max_epochs=5 if options.smoke else options.epochs,
        strategy=strategy,
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    )
    module = GAN()
    trainer.fit(module, DataLoader(TensorDataset(real, labels), batch_size=256, shuffle=True))
    digits = torch.arange(1000) % 10
    fakes = module(digits).detach()
    draw(fakes, OUT / "fakes.png")
    correlation = agreement(fakes, digits, real, labels)
    print(strategy.privacy_statement())
    print(f"correlation of the mean digits with those of the data: {correlation:.2f}; pictures: {OUT / 'fakes.png'}")
    assert 9.5 < strategy.epsilon() <= 10.0
    assert strategy.ledger.num_steps == strategy.plan.steps == trainer.global_step // 2
    assert options.smoke or correlation >= 0.5, f"Expected a correlation of at least 0.5, got {correlation:.2f}."


if __name__ == "__main__":
    main()
