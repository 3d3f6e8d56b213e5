"""The step itself: clipping, noise, divisor, ledger, and what a user's hooks can see (guarantees I1 to I5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.clipping import FlatClipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.step import PrivateStep
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, Recorder, make_dataset, make_loader, make_trainer

MICROBATCHES = (None, 3, 1)


def clipped_sum(module: Classifier, features: Tensor, labels: Tensor, max_grad_norm: float) -> dict[str, Tensor]:
    """The clipped sum by a loop over single samples with plain autograd."""
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for x, y in zip(features, labels, strict=True):
        loss = nn.functional.cross_entropy(module(x[None]), y[None])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient * min(1.0, max_grad_norm / float(norm))
    return total


@pytest.mark.parametrize("microbatch_size", MICROBATCHES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_without_noise_is_the_clipped_mean(tmp_path: Any, microbatch_size: int | None, accumulate: int) -> None:
    """Every record is in the batch (q = 1), so the sum is known; C = 1.4 clips some samples and not others."""
    module, dataset = Classifier(lr=0.0), make_dataset()
    norms = [
        math.sqrt(
            sum(
                float((g**2).sum())
                for g in torch.autograd.grad(
                    nn.functional.cross_entropy(module(x[None]), y[None]), list(module.parameters())
                )
            )
        )
        for x, y in dataset
    ]
    assert min(norms) < 1.4 < max(norms)
    strategy = DPStrategy(
        noise_multiplier=0.0, max_grad_norm=1.4, microbatch_size=microbatch_size, check_per_sample=False
    )
    recorder = Recorder()
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], accumulate_grad_batches=accumulate)
    trainer.fit(module, make_loader(batch_size=64 // accumulate))
    assert len(recorder.before_step) == 1
    expected = clipped_sum(module, *dataset.tensors, max_grad_norm=1.4)
    for name, gradient in recorder.before_step[0].items():
        torch.testing.assert_close(gradient, expected[name] / 64, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", MICROBATCHES)
def test_raw_gradients_never_reach_a_hook(tmp_path: Any, microbatch_size: int | None) -> None:
    """The module's hook runs in every microbatch; a callback's has one effect per batch, whatever was drawn."""
    recorder = Recorder()
    seen: list[Tensor | None] = []

    class Watching(Classifier):
        def on_after_backward(self) -> None:
            seen.extend(parameter.grad for parameter in self.parameters())

    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=microbatch_size, check_per_sample=False)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(Watching(), make_loader())
    assert len(recorder.after_backward) == strategy.ledger.num_steps
    for gradients in recorder.after_backward:
        assert all(gradient is None for gradient in gradients.values())
    assert microbatch_size is None or len(seen) > 2 * 4 * strategy.ledger.num_steps  # of four parameters
    assert all(gradient is None for gradient in seen)


def test_divisor_is_the_expected_batch_size_whatever_was_drawn(tmp_path: Any) -> None:
    """All gradients are equal and unclipped, so the private gradient is proportional to the number drawn."""

    class Constant(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(torch.ones_like(batch[0])) * 1e-3).sum(1).mean()

    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=1.0, check_per_sample=False)
    module = Constant(network=nn.Linear(NUM_FEATURES, NUM_CLASSES), lr=0.0)
    make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=5).fit(module, make_loader(batch_size=16))
    for batch, seen in zip(recorder.batches, recorder.before_step, strict=True):
        drawn = len(batch[0])
        torch.testing.assert_close(seen["network.bias"], torch.full((NUM_CLASSES,), 1e-3 * drawn / 16))
    assert len({len(batch[0]) for batch in recorder.batches}) > 1


class Silent(Classifier):
    """Its loss never uses the second layer, and the first sees zeros."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network[0](torch.zeros_like(batch[0])).sum(1).mean() * 0.0


@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.one_in(2)
def test_every_coordinate_carries_noise_of_the_stated_std(tmp_path: Any, sigma: float) -> None:
    """53 coordinates x 100 steps; the variance's z-score must stay under 5 (false alarm < 1e-6) and reject 2/3 and
    3/2.
    """
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=sigma, max_grad_norm=0.7, check_per_sample=False)
    make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=25).fit(Silent(), make_loader())
    draws = torch.stack([torch.cat([g.reshape(-1) for g in seen.values()]) for seen in recorder.before_step])
    assert draws.shape == (100, 53)
    standard = draws.double() * 16 / (sigma * 0.7)
    for wrong in (1.0, 2 / 3, 3 / 2):
        z = ((standard / wrong).square().sum() - standard.numel()) / math.sqrt(2 * standard.numel())
        assert (abs(z) < 5) == (wrong == 1.0), wrong
    # 7 and 5.8 deviations away
    assert (standard.std(0) > 0.5).all()
    assert abs(standard[1:].flatten() @ standard[:-1].flatten()) / standard.numel() < 0.08


def test_extreme_samples_contribute_at_most_the_clipping_norm(tmp_path: Any) -> None:
    """Zero, huge, infinite and NaN samples with one ordinary one: each adds at most C, the bad ones nothing."""
    features = torch.tensor([0.0, 1e30, math.inf, math.nan, 1.0])[:, None].repeat(1, NUM_FEATURES)
    dataset = torch.utils.data.TensorDataset(features, torch.tensor([0, 1, 2, 0, 1]))

    class Linear(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum(1)

    recorder = Recorder()
    module = Linear(network=nn.Linear(NUM_FEATURES, NUM_CLASSES), lr=0.0)
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=0.5, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=5))
    total = {name: gradient * 5 for name, gradient in recorder.before_step[0].items()}
    assert all(torch.isfinite(gradient).all() for gradient in total.values())
    zero, one = torch.zeros(1, NUM_FEATURES), torch.ones(1, NUM_FEATURES)
    expected = torch.zeros(NUM_CLASSES)
    for x in (zero, one):
        norm = math.sqrt(NUM_CLASSES * (float((x**2).sum()) + 1))
        expected += min(1.0, 0.5 / norm)
    torch.testing.assert_close(total["network.bias"], expected)


def test_tiny_factors_keep_every_sample_within_the_bound(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of 1e18 under C = 1.3e-20: divided by the batch size from the start, the factor would be a coarse
    subnormal.
    """
    monkeypatch.setattr(GaussianNoise, "fill_", lambda self, tensor, std: tensor.zero_())
    bound, seen = 1.3e-20, []
    for size in (1e18 + number * 3e16 for number in range(12)):
        module = Classifier(network=nn.Linear(1, 1, bias=False), lr=0.0)
        module.training_step = lambda batch, batch_idx, of=module: of(batch[0]).sum()
        recorder = Recorder()
        strategy = DPStrategy(noise_multiplier=1.0, max_grad_norm=bound, loss_reduction="sum", check_per_sample=False)
        data = torch.zeros(10, 1)
        data[0] = size
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=10)
        make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=1).fit(module, loader)
        seen.append(10 * float(recorder.before_step[0]["network.weight"]))
    assert all(0 <= contribution <= bound for contribution in seen)


def test_empty_batch_runs_once_is_noised_and_counted(tmp_path: Any) -> None:
    """Q = 1/64 at batch size 1: about 37 % of the batches are empty; one record of weight 0 runs in their place."""
    calls: list[int] = []

    class Counting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=1.0, check_per_sample=False)
    make_trainer(strategy, tmp_path, callbacks=[recorder]).fit(Counting(), make_loader(batch_size=1))
    empty = sum(len(batch[0]) == 0 for batch in recorder.batches)
    assert empty > 5
    assert len(recorder.before_step) == strategy.ledger.num_steps == strategy.steps_taken == 64
    assert all(float(seen["network.0.bias"].abs().min()) > 0 for seen in recorder.before_step)
    assert len(calls) - 4 == 64  # four more calls learned the layout, and compared it with the owners of rows


def test_one_nan_sample_leaves_the_others_in_place(tmp_path: Any) -> None:
    features, labels = make_dataset().tensors
    features = features.clone()
    features[5] = math.nan
    dataset = torch.utils.data.TensorDataset(features, labels)
    keep = torch.arange(len(labels)) != 5
    recorder, module = Recorder(), Classifier(lr=0.0)
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=1.4)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch_size=64))
    expected = clipped_sum(module, features[keep], labels[keep], max_grad_norm=1.4)
    for name, gradient in recorder.before_step[0].items():
        torch.testing.assert_close(gradient, expected[name] / 64, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_ledger_holds_a_step_before_its_release(first: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise drawn when the batch began is written down where it is spent; added to the sum, where it is drawn."""
    strategy = DPStrategy(noise_multiplier=1.5, secure_rng=not first, check_per_sample=False)
    drawn: dict[str, list[int]] = {"add_": [], "fill_": []}
    for name, seen in drawn.items():
        draw = getattr(GaussianNoise, name)

        def spy(self: GaussianNoise, *args: Any, seen: list[int] = seen, draw: Any = draw) -> Tensor:
            seen.append(strategy.ledger.num_steps)
            return draw(self, *args)

        monkeypatch.setattr(GaussianNoise, name, spy)
    released: list[int] = []
    monkeypatch.setattr(Reduction, "reduce", lambda self, accumulator: released.append(strategy.ledger.num_steps))
    make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())
    assert drawn == ({"add_": [], "fill_": [0, 1, 2, 3]} if first else {"add_": [1, 2, 3, 4], "fill_": []})
    assert released == [1, 2, 3, 4]
    (entry,) = strategy.ledger.entries
    assert (entry.event.noise_multiplier, entry.event.sample_rate) == (1.5, 0.25)


def test_clipping_that_changes_within_a_batch_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    collect = PrivateStep.collect

    def changing(self: PrivateStep, optimizer: int = 0) -> None:
        collect(self, optimizer)
        self.accumulators[optimizer].clipping = FlatClipping(3.0)

    monkeypatch.setattr(PrivateStep, "collect", changing)
    with pytest.raises(PrivacyError, match=r"a sensitivity of 1 as settled when the batch began, got 3"):
        make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())
    assert all(parameter.grad is None for parameter in strategy.lightning_module.parameters())


def test_noise_of_each_step_has_its_scale_and_is_its_own(tmp_path: Any) -> None:
    """Chi-square over 40,000 coordinates a step, false-alarm rate 2e-8 a step; noise is 1000 times what a sample
    adds.
    """
    wide = nn.Sequential(nn.Linear(NUM_FEATURES, 4000), nn.Tanh(), nn.Linear(4000, NUM_CLASSES))
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=1000.0, max_grad_norm=1.0, target_delta=1e-5, check_per_sample=False)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=1)
    trainer.fit(Classifier(wide, lr=0.0), make_loader(batch_size=16))
    steps = [torch.cat([g.flatten() for g in found.values()]) * 16 / 1000 for found in recorder.before_step]
    assert len(steps) == 4
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=steps[0].numel())
    for scaled in steps:
        assert low < float(scaled.double().square().sum()) < high
        assert not any(low < float((wrong * scaled).double().square().sum()) < high for wrong in (2 / 3, 3 / 2))
    products = torch.stack(steps) @ torch.stack(steps).mT / steps[0].numel() ** 0.5
    assert float(products.triu(1).abs().max()) < 6
