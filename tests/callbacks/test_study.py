"""Callbacks for study, and what all callbacks share: a private strategy is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    DPStrategy,
    GradientDiagnostics,
    MagnitudePruning,
    NoiseScheduler,
    PrivacyBudget,
    PublishedAutoThreshold,
    SwitchToDP,
)
from tests.helpers import Classifier, make_loader, make_trainer
from tests.step.composition.table import Combination, NoiseSpy, fit
from tests.strategies.test_manual import TwoOptimizers


@pytest.mark.parametrize(
    "callback",
    [
        AdaptiveClipping(),
        AutoThreshold(),
        ClippingScheduler("step", factor=0.5),
        GradientDiagnostics(),
        MagnitudePruning(0.5),
        NoiseScheduler("step", factor=0.5),
        PrivacyBudget(1.0),
        PublishedAutoThreshold(),
        SwitchToDP(1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_private_strategy_is_needed(callback: L.Callback, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"with {type(callback).__name__}, got SingleDeviceStrategy"):
        make_trainer("auto", tmp_path, callbacks=[callback]).fit(Classifier(), make_loader())


@pytest.mark.parametrize("at_epoch", [-1, 1.0, True, None])
def test_switch_arguments(at_epoch: Any) -> None:
    with pytest.raises(ValueError, match="at_epoch to be a whole number >= 0"):
        SwitchToDP(at_epoch)
    with pytest.raises(TypeError, match="reverse"):
        SwitchToDP(1, reverse="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("at_epoch", "reverse", "private"), [(0, False, 6), (5, False, 0), (0, True, 0), (5, True, 6)])
def test_a_switch_outside_the_run_leaves_one_phase(at_epoch: int, reverse: bool, private: int, tmp_path: Path) -> None:
    strategy, _, _ = fit(Combination(), tmp_path, callbacks=[SwitchToDP(at_epoch, reverse=reverse)])
    kinds = [run.event.kind for run in strategy.ledger.entries for _ in range(run.num_steps)]
    assert kinds == ["poisson"] * private + ["non_private"] * (6 - private)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError)])
def test_diagnostics_arguments(every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="every_n_steps"):
        GradientDiagnostics(every_n_steps=every)


def test_diagnostics_are_logged_every_n_steps(tmp_path: Path) -> None:
    seen = []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logged = set(trainer.logged_metrics)
            seen.append(sorted(name for name in logged if name.startswith("nonprivate/")))

    fit(Combination(), tmp_path, callbacks=[GradientDiagnostics(every_n_steps=3), Read()])
    names = ["nonprivate/clip_fraction", "nonprivate/clipping_bias", "nonprivate/noise_to_signal"]
    assert [bool(logged) for logged in seen[:3]] == [False, False, True]
    assert seen[2] == names


def test_diagnostics_change_nothing_about_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    for callbacks in ([], [GradientDiagnostics()]):
        spy = NoiseSpy(monkeypatch)
        strategy, _, _ = fit(Combination(mask="sparse", bound="adaptive"), tmp_path, callbacks=list(callbacks))
        monkeypatch.undo()
        released.append(([draw.after.tolist() for draw in spy.draws], strategy.epsilon()))
    assert released[0] == released[1]


@pytest.mark.parametrize("bound", [AdaptiveClipping(), AdaptiveClipping(count_noise=1.2), AutoThreshold()])
def test_noise_to_signal_is_that_of_the_noise_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: L.Callback
) -> None:
    """The count of AdaptiveClipping takes its share of the noise multiplier: the gradient's noise is larger for it."""
    spy, logged = NoiseSpy(monkeypatch), []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            logged.append(float(trainer.callback_metrics["nonprivate/noise_to_signal"]))

    fit(Combination(), tmp_path, batch_size=12, microbatch_size=5, callbacks=[bound, GradientDiagnostics(), Read()])
    expected = [draw.std * draw.before.numel() ** 0.5 / float(draw.before.norm()) for draw in spy.gradients]
    assert logged == pytest.approx(expected, rel=1e-5)


def test_diagnostics_speak_of_one_sum_of_gradients(tmp_path: Path) -> None:
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=[GradientDiagnostics()])
    with pytest.raises(ValueError, match="one private optimizer with GradientDiagnostics, got 2"):
        trainer.fit(TwoOptimizers(), make_loader())
