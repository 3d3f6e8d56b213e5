"""Clippings that set the scale of the gradient, and votes, through whole runs with several optimizers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dp import (
    AutomaticClipping,
    DPStrategy,
    PSACClipping,
    TopAgg,
)
from tests.helpers import Classifier, Recorder, make_loader, make_trainer
from tests.step.composition.table import NoiseSpy, make_data, weights


def test_r_dependent_form_is_the_same_run_in_other_units(tmp_path: Any) -> None:
    """R with (lr, weight decay) equals R = 1 with (lr R, weight decay / R) under SGD with momentum, noise included."""

    def run(bound: float, lr: float, decay: float) -> torch.Tensor:
        module = Classifier(optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=decay), lr=lr)
        strategy = DPStrategy(
            noise_multiplier=1.0,
            target_delta=1e-3,
            clipping=AutomaticClipping(max_grad_norm=bound),
            seed=0,
            check_per_sample=False,
        )
        make_trainer(strategy, tmp_path, max_epochs=3).fit(module, make_loader())
        return weights(module)

    wide = run(4.0, 0.05, 0.02)
    assert torch.allclose(wide, run(1.0, 0.2, 0.005), atol=1e-6)
    assert not torch.allclose(wide, run(1.0, 0.05, 0.02), atol=1e-2)


def optimizers() -> dict[str, Any]:
    """Optimizers whose steps do not change with the scale of the gradient, up to their eps."""
    from pytorch_optimizer import Lamb

    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lamb": Lamb}


NORMALISING = {"AUTO-S": (AutomaticClipping, 0.01), "AUTO-V": (AutomaticClipping, 0.0), "PSAC": (PSACClipping, 0.01)}


@pytest.mark.parametrize(
    ("optimizer", "name", "per_layer"),
    [(o, n, (i + j) % 2 == 1) for i, o in enumerate(("adam", "adamw", "lamb")) for j, n in enumerate(NORMALISING)],
)
@pytest.mark.one_in(3)
def test_optimizers_without_a_scale_do_not_see_the_bound(
    optimizer: str, name: str, per_layer: bool, tmp_path: Any
) -> None:
    """The R-dependent form at the same learning rate and weight decay, noise included, to 1e-6."""
    make, (kind, gamma) = optimizers()[optimizer], NORMALISING[name]
    decay = 0.0 if optimizer == "adam" else 0.01  # Adam adds the decay to the gradient, whose scale then matters

    def run(bound: float) -> torch.Tensor:
        module = Classifier(optimizer=lambda p, lr: make(p, lr=lr, eps=1e-12, weight_decay=decay), lr=0.01)
        clipping = kind(gamma=gamma, max_grad_norm=bound, per_layer=per_layer)
        strategy = DPStrategy(
            noise_multiplier=1.0, target_delta=1e-3, clipping=clipping, seed=0, check_per_sample=False
        )
        make_trainer(strategy, tmp_path, max_epochs=2).fit(module, make_loader())
        return weights(module)

    trained = run(1.0)
    assert torch.allclose(run(4.0), trained, atol=1e-6)
    assert float((trained - weights(Classifier())).abs().max()) > 1e-3


def test_lamb_steps_by_its_trust_ratio(tmp_path: Any) -> None:
    """A private gradient reaches a maintained LAMB as any gradient does: every tensor moves by the same share of its
    norm.
    """
    module = Classifier(optimizer=lambda p, lr: optimizers()["lamb"](p, lr=lr), lr=0.01)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, clipping="automatic", seed=0)
    make_trainer(strategy, tmp_path, max_epochs=1, max_steps=1).fit(module, make_loader())
    shares = [float((p.detach() - before[name]).norm() / before[name].norm()) for name, p in module.named_parameters()]
    assert shares == pytest.approx([shares[0]] * len(shares), rel=1e-3)
    assert shares[0] >= 0.01
    assert math.isfinite(strategy.epsilon())


def test_votes_by_microbatch_are_noised_everywhere(tmp_path: Any, monkeypatch: Any) -> None:
    """No more per-sample gradients at hand than a microbatch has samples; noise on all coordinates, voted on or not."""
    sizes, spy = [], NoiseSpy(monkeypatch)
    contributions = TopAgg.contributions

    def follow(self: TopAgg, grads_BP: torch.Tensor, live: Any = None) -> torch.Tensor:
        added = contributions(self, grads_BP, live)
        sizes.append(len(grads_BP))
        assert bool((added.square().sum(1) == 4).all())  # sqrt(k) exactly: squares of signs
        return added

    monkeypatch.setattr(TopAgg, "contributions", follow)
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, clipping=TopAgg(4), microbatch_size=5)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder])
    trainer.fit(Classifier(), DataLoader(make_data(), batch_size=12))
    assert sum(sizes) == 12
    assert max(sizes) <= 5
    (draw,) = spy.draws
    assert draw.std == 2.0
    assert int((draw.before == 0).sum()) > 0
    assert all(bool((gradient != 0).all()) for gradient in recorder.before_step[0].values())
