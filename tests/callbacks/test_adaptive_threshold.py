"""Bounds that follow the run, under a Trainer: each step's bound from the releases before it, the noise of count and
gradient.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import AdaptiveClipping, AutoThreshold, DPStrategy, NoiseScheduler, PublishedAutoThreshold, SwitchToDP
from lightning_dp.clipping.bounds import NoisyGradientBound
from lightning_dp.step.step import PrivateStep
from tests.helpers import Classifier, Recorder, make_loader, make_trainer
from tests.reference import per_sample_gradients
from tests.step.composition.table import Combination, NoiseSpy, fit, make_data

B, C_0 = 12, 0.5  # the whole of make_data() in every batch; the bound of Combination's "flat"


def gradients(module: L.LightningModule) -> Tensor:
    """Per-sample gradients of all records, shape (B, P)."""
    features, labels = make_data().tensors
    grads = per_sample_gradients(
        module, lambda i: nn.functional.cross_entropy(module(features[i : i + 1]), labels[i : i + 1]), B
    )
    return torch.cat([grad.flatten(1) for grad in grads.values()], 1)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("mask", ["dense", "sparse", "pruned"])
@pytest.mark.one_in(2)
def test_auto_threshold_follows_the_last_noisy_gradient(
    mask: str, relation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise that is subtracted is that of the release: its own bound, live coordinates, relation and sigma."""
    spy, callback = NoiseSpy(monkeypatch), AutoThreshold(3.0)
    strategy, _, trainer = fit(
        Combination(mask=mask, noise="step"),
        tmp_path,
        batch_size=B,
        callbacks=[callback],
        noise_multiplier=0.3,
        accountant="pld",
        neighboring_relation=relation,
        trainer_options={"max_epochs": 6},
    )
    factor = 2 if relation == "replace_one" else 1
    bound, seen = C_0, []
    for step, draw in enumerate(spy.draws):
        std = strategy.plan.sigma(step) * factor * bound
        assert draw.std == pytest.approx(std, rel=1e-6)
        signal = float(draw.after.double().square().sum()) - draw.after.numel() * std**2
        bound = min(max(3.0 * math.sqrt(max(signal, 0.0)) / B, C_0 / 10), C_0 * 10)
        seen.append(bound)
    assert callback.bound.value == pytest.approx(seen[-1], rel=1e-6)
    assert len({round(value, 6) for value in seen}) > 3  # neither end of the range all the time
    assert float(trainer.callback_metrics["privacy/max_grad_norm"]) == pytest.approx(seen[-1], rel=1e-6)
    assert math.isfinite(strategy.epsilon())


def test_auto_threshold_sees_the_sum_with_its_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that begins with its noise is not held as a mean where a bound learns from it: the same bounds under one
    seed.
    """
    found, observe = [], NoisyGradientBound.observe
    for first in (True, False):
        bounds: list[float] = []

        def watching(self: Any, release: Any, to: list[float] = bounds) -> None:
            observe(self, release)
            to.append(self.value)

        monkeypatch.setattr(NoisyGradientBound, "observe", watching)
        if not first:
            monkeypatch.setattr(PrivateStep, "noise_comes_first", lambda self: False)
        options = {"batch_size": B, "noise_multiplier": 0.3, "trainer_options": {"max_epochs": 6}}
        fit(Combination(), tmp_path, callbacks=[AutoThreshold(3.0)], **options)
        monkeypatch.undo()
        found.append(bounds)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len({round(value, 6) for value in found[0]}) > 3  # neither end of the range all the time


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "top_agg_values"])
@pytest.mark.one_in(2)
def test_adaptive_clipping_counts_moves_and_shares_the_noise(
    clipping: str, relation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, callback = NoiseSpy(monkeypatch), AdaptiveClipping(0.6, rate=0.5, count_noise=3.0)
    strategy, module, _ = fit(
        Combination(clipping, noise="step"),
        tmp_path,
        batch_size=B,
        module=Classifier(lr=0.0),
        microbatch_size=5,
        callbacks=[callback],
        accountant="pld",
        neighboring_relation=relation,
        trainer_options={"max_epochs": 5},
    )
    factor = 2 if relation == "replace_one" else 1
    norms = gradients(module).norm(dim=1)
    start = 1.0 if clipping == "top_agg_values" else C_0
    bound = start
    for step, (gradient, count) in enumerate(zip(spy.gradients, spy.statistics, strict=True)):
        z = strategy.plan.sigma(step)
        assert count.std == pytest.approx(3.0 * factor)
        assert gradient.std == pytest.approx((z**-2 - 6.0**-2) ** -0.5 * factor * bound)
        assert float(count.before) == int((norms <= bound).sum()) - B / 2
        bound *= math.exp(-0.5 * (float(count.after) / B + 0.5 - 0.6))
        bound = min(max(bound, start / 10), start * 10)
    assert callback.bound.value == pytest.approx(bound)
    assert len(spy.gradients) == strategy.ledger.num_steps == 5


def test_an_empty_batch_counts_nothing_and_is_noised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = NoiseSpy(monkeypatch)
    strategy, _, _ = fit(
        Combination(bound="adaptive"), tmp_path, batch_size=1, accountant="pld", trainer_options={"max_epochs": 3}
    )
    assert len(spy.statistics) == strategy.ledger.num_steps == 36
    empty = [s for g, s in zip(spy.gradients, spy.statistics, strict=True) if not g.before.any()]
    assert 3 < len(empty) < 36  # q = 1/12: about 13; the seed is fixed
    assert all(float(draw.before) == 0 and float(draw.after) != 0 for draw in empty)


@pytest.mark.parametrize("sigmas", [[2.0, 2.0], [0.5, 4.0]], ids=["from the start", "later in the schedule"])
def test_too_little_count_noise_is_refused_at_first(
    sigmas: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = NoiseSpy(monkeypatch)
    callbacks = [AdaptiveClipping(count_noise=0.9), NoiseScheduler(lambda e: sigmas[e])]
    with pytest.raises(ValueError, match=r"2 x count_noise > the noise multiplier"):
        fit(Combination(), tmp_path, callbacks=callbacks, noise_multiplier=1.0)
    assert spy.draws == []


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_published_threshold_says_it_is_not_private(
    weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G~ = C (sum_i g_i / (||g_i|| + gamma) + N(0, sigma^2)) with C = W mean ||g_i||, over B."""
    spy, recorder = NoiseSpy(monkeypatch), Recorder()
    strategy, module, _ = fit(
        Combination(),
        tmp_path,
        batch_size=B,
        module=Classifier(lr=0.0),
        callbacks=[PublishedAutoThreshold(weight), recorder],
        trainer_options={"max_epochs": 2},
    )
    norms = gradients(module).norm(dim=1)
    scaled = (gradients(module) / (norms + 0.01)[:, None]).sum(0)
    for draw, released in zip(spy.gradients, recorder.before_step, strict=True):
        torch.testing.assert_close(draw.before, scaled, rtol=1e-4, atol=1e-5)
        assert draw.std == 2.0
        flat = torch.cat([gradient.flatten() for gradient in released.values()])
        torch.testing.assert_close(flat, draw.after * weight * norms.mean() / B, rtol=1e-4, atol=1e-6)
    assert strategy.epsilon() == math.inf
    assert "un-noised function of the batch" in strategy.privacy_statement()


@pytest.mark.parametrize("make", [AutoThreshold, AdaptiveClipping])
def test_a_new_run_begins_with_the_bound_of_the_strategy(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, first = make(), []
    for _ in range(2):
        spy = NoiseSpy(monkeypatch)
        fit(Combination(), tmp_path, batch_size=B, callbacks=[callback])
        monkeypatch.undo()
        first.append(spy.gradients[0].std)
        assert callback.bound.value != C_0
    assert first[0] == first[1]


@pytest.mark.parametrize("make", [AutoThreshold, AdaptiveClipping, PublishedAutoThreshold])
def test_plain_steps_neither_move_a_bound_nor_feel_one(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, recorder, callback = NoiseSpy(monkeypatch), Recorder(), make()
    _, module, _ = fit(
        Combination(),
        tmp_path,
        batch_size=B,
        module=Classifier(lr=0.0),
        callbacks=[callback, SwitchToDP(1), recorder],
        trainer_options={"max_epochs": 2},
    )
    plain = torch.cat([gradient.flatten() for gradient in recorder.before_step[0].values()])
    torch.testing.assert_close(plain, gradients(module).mean(0), rtol=1e-4, atol=1e-6)
    assert spy.gradients[0].std == 0.0
    z = {AutoThreshold: 2.0, AdaptiveClipping: 2.0 * (4 / 3) ** 0.5, PublishedAutoThreshold: 2.0 / C_0}[make]
    assert spy.gradients[1].std == pytest.approx(z * C_0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoThreshold(0.0), "0 < weight < inf"),
        (lambda: AutoThreshold(minimum=2.0, maximum=1.0), "minimum <= maximum"),
        (lambda: AutoThreshold(minimum=float("nan")), "0 < minimum < inf"),
        (lambda: AdaptiveClipping(1.0), "0 < quantile < 1"),
        (lambda: AdaptiveClipping(rate=0.0), "0 < rate < inf"),
        (lambda: AdaptiveClipping(count_noise=-1.0), "0 < count_noise < inf"),
        (lambda: AdaptiveClipping(maximum=0.0), "0 < maximum < inf"),
        (lambda: PublishedAutoThreshold(float("inf")), "0 < weight < inf"),
        (lambda: PublishedAutoThreshold(gamma=-1.0), "gamma"),
    ],
)
def test_threshold_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tcdp_refuses_where_its_lemma_does_not_hold(tmp_path: Path) -> None:
    def run(**options: Any) -> float:
        strategy = DPStrategy(target_delta=1e-5, accountant="tcdp", check_per_sample=False, **options)
        trainer = make_trainer(strategy, tmp_path, callbacks=[NoiseScheduler("step", factor=0.9)])
        trainer.fit(Classifier(), make_loader(64, batch_size=4))
        return strategy.epsilon()

    assert 0 < run(noise_multiplier=8.0) < math.inf
    with pytest.raises(ValueError, match=r"Expected .*noise_multiplier"):
        run(noise_multiplier=1.0)
