"""Mechanisms together through whole runs: targets, microbatches, resume, several optimizers, processes."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    DPStrategy,
    GradientDiagnostics,
    NoiseScheduler,
    PrivacyBudget,
    PublishedAutoThreshold,
    RandomSparsification,
    SwitchToDP,
)
from tests.helpers import NUM_FEATURES, Classifier, Recorder, make_loader, make_trainer
from tests.step.composition.table import Combination, NoiseSpy, fit, make_data, weights

#: One of everything, in combinations that matter.
MIXED = [
    Combination("auto_s", "sparse_pruned", "step", "scheduled"),
    Combination("per_layer", "cooling", "rate", "adaptive"),
    Combination("psac", "frozen", "step", "auto"),
    Combination("top_agg_plain", "sparse", "step", "fixed"),
    Combination("top_agg_values", "repruned", "rate", "adaptive"),
    Combination("flat", "sparse", "step", "published"),
]
PRIVATE = [combination for combination in MIXED if combination.is_private]


@pytest.mark.parametrize(
    ("combination", "accumulate"), [(c, 1 + number % 2) for number, c in enumerate(PRIVATE)], ids=str
)
@pytest.mark.one_in(2)
def test_target_is_met_and_not_exceeded(combination: Combination, accumulate: int, tmp_path: Any) -> None:
    strategy, _, _ = fit(
        combination,
        tmp_path,
        noise_multiplier=None,
        target_epsilon=2.0,
        trainer_options={"accumulate_grad_batches": accumulate},
        batch_size=4 // accumulate,
    )
    assert strategy.ledger.num_steps == 6
    assert 1.98 <= strategy.epsilon() <= 2.0


@pytest.mark.parametrize("combination", MIXED, ids=str)
@pytest.mark.one_in(3)
def test_microbatches_do_not_change_the_result(combination: Combination, tmp_path: Any) -> None:
    options = {"batch_size": 6, "check_per_sample": True}
    whole, cut = (fit(combination, tmp_path, microbatch_size=size, **options)[1] for size in (None, 2))
    assert torch.allclose(weights(whole), weights(cut), atol=1e-5)
    assert not torch.equal(weights(whole), weights(Classifier()))


@pytest.mark.parametrize("combination", MIXED, ids=str)
@pytest.mark.one_in(3)
def test_resumed_run_continues_masks_bounds_and_ledger(combination: Combination, tmp_path: Any) -> None:
    """A run of four epochs, and the same stopped after two and resumed: the same masks, bound, sigma and epsilon."""
    whole = Gradients()
    strategy, _, _ = fit(combination, tmp_path, callbacks=[whole], trainer_options={"max_epochs": 4})
    first = Gradients()
    _, _, trainer = fit(combination, tmp_path, callbacks=[first, StopAfter(2)], trainer_options={"max_epochs": 4})
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    second = Gradients()
    resumed, _, _ = fit(combination, tmp_path, callbacks=[second], ckpt_path=path, trainer_options={"max_epochs": 4})
    assert (len(first.live), len(second.live)) == (6, 6)
    assert resumed.ledger.num_steps == strategy.ledger.num_steps == 12
    assert resumed.epsilon() == pytest.approx(strategy.epsilon(), rel=1e-9)
    # masks of noisy weights follow them, and their noise is never drawn twice
    same = slice(0, 9) if combination.mask == "repruned" else slice(None)
    assert all(torch.equal(a, b) for a, b in zip(whole.live[same], (first.live + second.live)[same], strict=True))
    if combination.bound in ("adaptive", "auto"):
        assert second.bounds[0] == first.bounds_after[-1]


class StopAfter(L.Callback):
    """Stops a run that is planned to be longer."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class Gradients(L.Callback):
    """Which coordinates moved in each step, and the bound in force."""

    def __init__(self) -> None:
        self.live: list[torch.Tensor] = []
        self.bounds: list[float] = []
        self.bounds_after: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        strategy: Any = trainer.strategy
        (sums,) = strategy.accumulators.values()
        self.live.append(torch.ones(sums.num_coordinates) > 0 if sums.active is None else sums.active.clone())
        self.bounds.append(sums.sensitivity)
        self.bounds_after.append(getattr(strategy.mechanisms.bound, "value", sums.sensitivity))


class TwoOptimizers(L.LightningModule):
    """Manual optimization of two private networks on one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(NUM_FEATURES, 3), nn.Linear(NUM_FEATURES, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        features, labels = batch
        for network, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            loss = nn.functional.cross_entropy(network(features), labels)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.one, self.two)]


def test_several_optimizers_share_a_mask_and_one_event_a_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = NoiseSpy(monkeypatch)
    strategy = DPStrategy(noise_multiplier=2.0, target_delta=1e-3, clipping="automatic")
    callbacks = [
        RandomSparsification(0.5, schedule="constant"),
        NoiseScheduler("step", factor=0.5),
        ClippingScheduler("step", factor=0.5),
    ]
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=callbacks).fit(TwoOptimizers(), make_loader())
    sigmas = [run.event.noise_multiplier for run in strategy.ledger.entries for _ in range(run.num_steps)]
    assert sigmas == [2.0] * 4 + [1.0] * 4
    stds = [draw.std for draw in spy.gradients]
    assert stds == pytest.approx([2.0 * 2**0.5] * 8 + [2.0 * 2**0.5 * 0.25] * 8)
    assert sum(draw.before.numel() for draw in spy.gradients[:2]) == 42 - 21


@pytest.mark.parametrize("callback", [AutoThreshold(), AdaptiveClipping()], ids=["auto", "adaptive"])
def test_a_learned_bound_is_refused_for_several_optimizers(tmp_path: Any, callback: Any) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=[callback])
    with pytest.raises(
        ValueError, match=r"Expected one private optimizer with (AutoThreshold|AdaptiveClipping), got 2"
    ):
        trainer.fit(TwoOptimizers(), make_loader())


@pytest.mark.parametrize(
    ("callbacks", "what"),
    [
        ([AutoThreshold(), AdaptiveClipping()], "the clipping bound, got AutoThreshold and AdaptiveClipping"),
        ([ClippingScheduler("step", factor=0.5), PublishedAutoThreshold()], "the clipping bound"),
        ([NoiseScheduler("step", factor=0.5), NoiseScheduler("constant")], "the schedule of the noise"),
        ([SwitchToDP(1), SwitchToDP(2)], "the private phases"),
        ([GradientDiagnostics(), GradientDiagnostics(every_n_steps=2)], "the diagnostics"),
    ],
)
def test_two_rules_for_one_thing_are_refused(tmp_path: Any, callbacks: list[Any], what: str) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=f"Expected one callback for {what}"):
        trainer.fit(Classifier(), make_loader())


@pytest.mark.parametrize("callback", [PublishedAutoThreshold(), SwitchToDP(1)], ids=["published", "switch"])
def test_a_target_is_refused_where_epsilon_is_infinite(tmp_path: Any, callback: Any) -> None:
    trainer = make_trainer(DPStrategy(target_epsilon=1.0), tmp_path, callbacks=[callback])
    with pytest.raises(ValueError, match="Expected private steps only with target_epsilon=1"):
        trainer.fit(Classifier(), make_loader())


@pytest.mark.parametrize(
    ("clipping", "sigma", "finite"),
    [("flat", 0.0, False), ("none", 1.0, False), ("flat", 1.0, True), ("none", 0.0, False)],
    ids=["clip only", "noise only", "both", "neither"],
)
@pytest.mark.one_in(2)
def test_the_four_ablations(tmp_path: Any, monkeypatch: Any, clipping: str, sigma: float, finite: bool) -> None:
    spy, recorder = NoiseSpy(monkeypatch), Recorder()
    strategy = DPStrategy(noise_multiplier=sigma, target_delta=1e-3, clipping=clipping, max_grad_norm=0.1, seed=0)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
    trainer.fit(Classifier(), make_loader(num_records=16))
    assert math.isfinite(strategy.epsilon()) == finite
    assert [draw.std for draw in spy.gradients] == [pytest.approx(0.1 * sigma)]
    norm = float(torch.linalg.vector_norm(spy.gradients[0].before))
    assert (norm <= 16 * 0.1) == (clipping == "flat")
    assert ("not private" in strategy.privacy_statement()) == (not finite)


@pytest.mark.parametrize("reverse", [False, True])
def test_plain_phase_is_sgd_and_the_statement_says_so(tmp_path: Any, monkeypatch: Any, reverse: bool) -> None:
    spy, recorder = NoiseSpy(monkeypatch), Recorder()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, max_grad_norm=0.01, seed=0)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[SwitchToDP(1, reverse=reverse), recorder])
    module = Classifier(lr=0.0)
    loader = DataLoader(make_data(8), batch_size=8)
    trainer.fit(module, loader)
    features, labels = loader.dataset.tensors
    module.zero_grad()
    nn.functional.cross_entropy(module(features), labels).backward()
    plain, private = (1, 0) if reverse else (0, 1)
    for name, parameter in module.named_parameters():
        assert torch.allclose(recorder.before_step[plain][name], parameter.grad, atol=1e-6)
        assert not torch.allclose(recorder.before_step[private][name], parameter.grad, atol=1e-6)
    assert [draw.std for draw in spy.gradients] == ([0.01, 0.0] if reverse else [0.0, 0.01])
    kinds = [run.event.kind for run in strategy.ledger.entries]
    assert kinds == (["poisson", "non_private"] if reverse else ["non_private", "poisson"])
    assert strategy.epsilon() == math.inf
    assert "a step of plain SGD" in strategy.privacy_statement()


@pytest.mark.parametrize("bound", [AutoThreshold, AdaptiveClipping])
@pytest.mark.one_in(2)
def test_a_learned_bound_may_follow_a_plain_phase(tmp_path: Any, bound: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[SwitchToDP(1), bound()]).fit(Classifier(), make_loader())
    assert [run.event.kind for run in strategy.ledger.entries] == ["non_private", "poisson"]


def test_hook_writes_to_masked_gradients_do_not_last(tmp_path: Any) -> None:
    """SGD with Nesterov momentum and ``foreach`` adds to ``p.grad`` in place too."""
    zeros: list[int] = []

    class Writing(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if not trainer.strategy.is_on_trial:
                zeros.append(sum(int((p.grad == 0).sum()) for p in pl_module.parameters()))
            for p in pl_module.parameters():
                p.grad.add_(1.0)

    callbacks = [RandomSparsification(final_rate=0.5, schedule="constant"), Writing()]
    make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=callbacks).fit(Classifier(), make_loader())
    assert zeros == [53 // 2] * 4


def test_budget_refuses_a_run_with_plain_steps(tmp_path: Any) -> None:
    trainer = make_trainer(
        DPStrategy(noise_multiplier=1.0, target_delta=1e-3), tmp_path, callbacks=[SwitchToDP(1), PrivacyBudget(3.0)]
    )
    with pytest.raises(RuntimeError, match="Expected a budget that allows at least one step"):
        trainer.fit(Classifier(), make_loader())


def test_mechanisms_end_with_the_fit(tmp_path: Any) -> None:
    """A second fit of the same strategy, without callbacks, is dense, constant and bounded as at first."""
    strategy, _, _ = fit(MIXED[0], tmp_path, history=[])  # others with this seed have left the same weights
    assert strategy.mechanisms.masks == ()
    trainer, recorder = strategy.trainer, Recorder()
    trainer.callbacks = [recorder]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(strategy.module, DataLoader(make_data(), batch_size=4))
    assert len(recorder.before_step) == 6
    assert all((gradient != 0).all() for step in recorder.before_step for gradient in step.values())
