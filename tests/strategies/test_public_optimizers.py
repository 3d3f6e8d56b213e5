"""Public optimizers next to private ones: whenever they step, that their gradients are free of the data is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import PrivacyError
from tests.helpers import make_loader, make_trainer
from tests.strategies.test_manual import GAN
from tests.strategies.test_soundness import private


class Critic(GAN):
    """Its "public" generator steps every fourth batch, and on the data."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        if (batch_idx + 1) % 4 == 0:
            self.toggle_optimizer(generator)
            generator.zero_grad()
            self.manual_backward(self.generator(batch[0][:, :2]).square().mean())
            generator.step()
            self.untoggle_optimizer(generator)
        discriminator.zero_grad()
        self.manual_backward(self.discriminator(batch[0]).mean())
        discriminator.step()


def test_a_public_optimizer_that_steps_late_is_still_checked(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="changes with which samples"):
        make_trainer(private(public_optimizers=[0]), tmp_path).fit(Critic(), make_loader())


def test_a_public_optimizer_that_sees_the_data_later_is_refused(tmp_path: Path) -> None:
    class Later(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, discriminator = self.optimizers()
            seen = batch[0][:, :2] if self.global_step >= 2 else torch.ones(4, 2)
            self.toggle_optimizer(generator)
            generator.zero_grad()
            self.manual_backward(self.generator(seen).square().mean())
            generator.step()
            self.untoggle_optimizer(generator)
            discriminator.zero_grad()
            self.manual_backward(self.discriminator(batch[0]).mean())
            discriminator.step()

    strategy = private(public_optimizers=[0])
    with pytest.raises(PrivacyError, match="changes with which samples"):
        make_trainer(strategy, tmp_path).fit(Later(), make_loader())
    assert strategy.ledger.num_steps == 1


def test_a_public_optimizer_never_tried_is_refused(tmp_path: Path) -> None:
    class Whimsical(Critic):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            on_trial = self.trainer.strategy.is_on_trial
            super().training_step(batch, 0 if on_trial else 3)

    with pytest.raises(PrivacyError, match="trial did not step it"):
        make_trainer(private(public_optimizers=[0]), tmp_path).fit(Whimsical(), make_loader())


@pytest.mark.parametrize("microbatch_size", [None, 4, 1])
@pytest.mark.one_in(3)
def test_gans_in_the_usual_order(tmp_path: Path, microbatch_size: int | None) -> None:
    """The discriminator first, with fakes for each real; then the generator on a fixed number of its own."""

    class Usual(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            real, _ = batch
            generator, discriminator = self.optimizers()
            fake = self.generator(torch.randn(len(real), 2)).detach()
            discriminator.zero_grad()
            self.manual_backward(self.discriminator(fake).mean() - self.discriminator(real).mean())
            discriminator.step()
            self.toggle_optimizer(generator)
            generator.zero_grad()
            self.manual_backward(-self.discriminator(self.generator(torch.randn(4, 2))).mean())
            generator.step()
            self.untoggle_optimizer(generator)

    strategy = private(public_optimizers=[0], microbatch_size=microbatch_size)
    trainer = make_trainer(strategy, tmp_path)
    trainer.fit(Usual(), make_loader())
    assert (strategy.ledger.num_steps, trainer.global_step) == (4, 8)
