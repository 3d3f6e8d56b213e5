"""Manual optimization: one optimizer, a public one next to a private one, several private ones."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_FEATURES, ByHand, Classifier, Recorder, make_dataset, make_loader, make_trainer


class Manual(ByHand, Classifier):
    """The classifier, stepping by itself."""


class TwoOptimizers(Manual):
    """One optimizer a layer, both fed by the data."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=self.lr) for layer in (self.network[0], self.network[2])]


class GAN(L.LightningModule):
    """A private discriminator and a public generator that draws a fixed number of fakes for its own step."""

    fakes = 8

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, NUM_FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        generator, discriminator = self.optimizers()
        bce = nn.functional.binary_cross_entropy_with_logits
        self.toggle_optimizer(generator)
        fooled = self.discriminator(self.generator(torch.randn(self.fakes or len(real), 2)))
        generator.zero_grad()
        self.manual_backward(bce(fooled, torch.ones_like(fooled)))
        generator.step()
        self.untoggle_optimizer(generator)
        fake = self.generator(torch.randn(len(real), 2)).detach()
        on_real, on_fake = self.discriminator(real), self.discriminator(fake)
        loss = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]


@pytest.mark.parametrize("microbatch_size", [None, 5, 1])
@pytest.mark.one_in(3)
def test_manual_equals_automatic(tmp_path: Any, microbatch_size: int | None) -> None:
    seen = []
    for module in (Classifier(), Manual()):
        recorder = Recorder()
        strategy = DPStrategy(
            noise_multiplier=0.7, seed=3, microbatch_size=microbatch_size, max_grad_norm=0.5, check_per_sample=False
        )
        trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=2)
        trainer.fit(module, make_loader())
        assert strategy.ledger.num_steps == strategy.steps_taken == trainer.global_step == 8
        seen.append(recorder.before_step)
    for automatic, manual in zip(*seen, strict=True):
        torch.testing.assert_close(automatic, manual)


def test_empty_batches_step_in_manual_mode_too(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=0.7)
    trainer = make_trainer(strategy, tmp_path)
    trainer.fit(Manual(), make_loader(32, batch_size=1))
    assert strategy.ledger.num_steps == trainer.global_step == 32


def test_dummy_sample_of_an_empty_batch_contributes_nothing(tmp_path: Any) -> None:
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, check_per_sample=False)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(Manual(lr=0.0), make_loader(batch_size=1))
    empty = [torch.cat([g.flatten() for g in s.values()]).abs().max() == 0 for s in recorder.before_step]
    assert 5 < sum(empty) < 60


def test_two_private_optimizers_on_one_batch_are_one_event(tmp_path: Any) -> None:
    """Each layer is noised with sigma sqrt(2), so that both together cost one release at sigma."""
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=1.5, max_grad_norm=0.2, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=25)
    module = TwoOptimizers(lr=0.0)
    trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == strategy.steps_taken == 100
    (entry,) = strategy.ledger.entries
    assert entry.event.noise_multiplier == pytest.approx(1.5)
    draws = torch.stack([s["network.0.weight"].flatten() for s in recorder.before_step[1::2]]).double() * 16 / 0.2
    spread = float(draws.var(0).mean())
    # 30 coordinates x 100 draws: the sample variance is within 8 % (4 standard errors plus the clipped signal's share)
    assert spread == pytest.approx(2 * 1.5**2, rel=0.16)


def test_a_further_step_on_the_same_batch_is_paid(tmp_path: Any) -> None:
    class Twice(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    strategy = DPStrategy(noise_multiplier=2.0)
    make_trainer(strategy, tmp_path).fit(Twice(), make_loader())
    (entry,) = strategy.ledger.entries
    assert entry.num_steps == 4
    assert entry.event.noise_multiplier == pytest.approx(2.0 / math.sqrt(2))


def test_a_gan_with_a_public_generator(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, public_optimizers=[0])
    trainer = make_trainer(strategy, tmp_path)
    module = GAN()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit(module, make_loader())
    assert strategy.ledger.num_steps == 4
    assert trainer.global_step == 8
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_the_public_generator_gets_its_plain_gradient(tmp_path: Any) -> None:
    """With a frozen discriminator and one seed, private training leaves the generator's own steps as they were."""
    ends = []
    for strategy in ("auto", DPStrategy(noise_multiplier=1.0, public_optimizers=[0], check_per_sample=False)):
        torch.manual_seed(5)
        module = Reseeded()
        module.configure_optimizers = lambda module=module: [
            torch.optim.SGD(module.generator.parameters(), lr=0.1),
            torch.optim.SGD(module.discriminator.parameters(), lr=0.0),
        ]
        trainer = make_trainer(strategy, tmp_path)
        trainer.fit(module, make_loader(batch_size=64))
        ends.append([p.detach().clone() for p in module.generator.parameters()])
    torch.testing.assert_close(*ends)


class Reseeded(GAN):
    """Draws the same in every run: the private step begins the global generators from fresh entropy at each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)
        super().training_step(batch, batch_idx)


def test_a_public_optimizer_that_sees_the_data_is_refused(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, public_optimizers=[0])
    with pytest.raises(PrivacyError, match="changes with which samples are in the batch"):
        make_trainer(strategy, tmp_path).fit(TwoOptimizers(), make_loader())


def test_a_public_optimizer_that_sees_the_batch_size_is_refused(tmp_path: Any) -> None:
    module = GAN()
    module.fakes = 0
    strategy = DPStrategy(noise_multiplier=1.0, public_optimizers=[0])
    with pytest.raises(PrivacyError, match="changes with how many samples the batch holds"):
        make_trainer(strategy, tmp_path).fit(module, make_loader())


def test_public_positions_are_checked(tmp_path: Any) -> None:
    for public, message in (([2], "below 2"), ([0, 1], "at least one private optimizer")):
        with pytest.raises(ValueError, match=message):
            make_trainer(DPStrategy(noise_multiplier=1.0, public_optimizers=public), tmp_path).fit(GAN(), make_loader())


def test_gradients_kept_over_batches_are_refused(tmp_path: Any) -> None:
    """Accumulating by hand would let one sample count several times in a step."""

    class Accumulating(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    with pytest.raises(PrivacyError, match="gradients of an earlier"):
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Accumulating(), make_loader())


def test_zero_grad_clears_what_the_generators_pass_left(tmp_path: Any) -> None:
    """What the generator's loss sent into the discriminator must not be part of the discriminator's step."""
    recorder = Recorder()

    class Loud(GAN):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            _, discriminator = self.optimizers()
            self.manual_backward(1e3 * self.discriminator(self.generator(torch.ones(len(batch[0]), 2))).mean())
            discriminator.zero_grad()
            self.manual_backward(self.discriminator(batch[0]).mean())
            discriminator.step()

    module = Loud()
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=1e6, public_optimizers=[0], check_per_sample=False)
    module.configure_optimizers = lambda: [
        torch.optim.SGD(part.parameters(), lr=0.0) for part in (module.generator, module.discriminator)
    ]
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(module, make_loader(batch_size=64))
    features: Tensor = make_dataset().tensors[0]
    expected = torch.autograd.grad(module.discriminator(features).mean(), list(module.discriminator.parameters()))
    for gradient, name in zip(expected, ("0.weight", "0.bias", "2.weight", "2.bias"), strict=True):
        torch.testing.assert_close(recorder.before_step[0][f"discriminator.{name}"], gradient, rtol=1e-4, atol=1e-6)


class ClippedByHand(Manual):
    """Clips between backward and step, where under a private strategy no gradient exists yet."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
        optimizer.step()


def test_clip_gradients_acts_on_the_private_gradient(tmp_path: Any) -> None:
    module = ClippedByHand(lr=1.0)
    before = torch.cat([p.detach().clone().flatten() for p in module.parameters()])
    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=5)
    make_trainer(strategy, tmp_path, max_steps=1).fit(module, make_loader())
    after = torch.cat([p.detach().flatten() for p in module.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-4)
    assert "clip_gradients" not in module.__dict__


def test_code_that_looks_for_raw_gradients_is_told_so(tmp_path: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    class Looks(Classifier):
        def on_after_backward(self) -> None:
            assert all(parameter.grad is None for parameter in self.parameters())

    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Looks(), make_loader())
    assert caplog.text.count("on_after_backward of Looks finds no gradients of private parameters") == 1

    class Adds(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            sum(parameter.grad.norm() for parameter in self.parameters())

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'norm'") as raised:
        make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path).fit(Adds(), make_loader())
    assert "on_before_optimizer_step finds the private ones" in raised.value.__notes__[-1]
