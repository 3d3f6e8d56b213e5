"""The std of a step's noise as users read it, and averages of weights: post-processing that costs nothing."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_dp import (
    AutoThreshold,
    CorrelatedNoise,
    DPStrategy,
    PerLayerClipping,
    PrivacyAudit,
    RandomSparsification,
)
from tests.helpers import Classifier, make_loader, make_trainer


class Nothing(Classifier):
    """No gradient at all: what its optimizer sees is noise, which it keeps in units of what the strategy says."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.seen: dict[str, list[Tensor]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        stds = self.trainer.strategy.noise_std
        for name, parameter in self.named_parameters():
            drawn = parameter.grad[parameter.grad != 0].double() / stds[name]
            self.seen.setdefault(name, []).append(drawn)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipping": PerLayerClipping(0.5, noise="least")},
        {"clipping": PerLayerClipping(0.5, noise="least"), "microbatch_size": 9, "secure_rng": True},
        {"clipping": PerLayerClipping(0.5, noise="least", group_weights={"*.weight": 2.0, "*": 1.0})},
    ],
    ids=["flat", "least", "least, secure", "least, patterns"],
)
@pytest.mark.one_in(2)
def test_stated_std_is_that_of_every_parameter(tmp_path: Any, options: Any) -> None:
    """40 steps: z < 5 for each of four parameters (false alarm 2.4e-6), also under a mask and a bound that moves; not
    so at other scales.
    """
    strategy, module = DPStrategy(noise_multiplier=1.3, target_delta=1e-3, check_per_sample=False, **options), Nothing()
    mask = RandomSparsification(0.3, refresh=1000, schedule="constant")
    make_trainer(strategy, tmp_path, max_epochs=10, callbacks=[mask, AutoThreshold(2.0)]).fit(module, make_loader())
    for wrong in (1.0, 2 / 3, 3 / 2):
        drawn = {name: torch.cat(found) * wrong for name, found in module.seen.items()}
        scores = {n: float((v.square().sum() - len(v)) / math.sqrt(2 * len(v))) for n, v in drawn.items()}
        assert all(abs(score) < 5 for score in scores.values()) == (wrong == 1.0), (wrong, scores)
    assert strategy.noise_std == {}


def test_stated_std_of_correlated_noise_is_that_of_the_step(tmp_path: Any) -> None:
    """Sigma sens(C) C / B in the first step, and sqrt(1 + lambda^2) of it later."""
    seen: list[float] = []

    class Reading(Nothing):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if not self.trainer.strategy.is_on_trial:
                seen.extend(set(self.trainer.strategy.noise_std.values()))

    strategy = DPStrategy(noise_multiplier=1.3, sampling="cyclic", noise=CorrelatedNoise(decay=0.8), max_grad_norm=0.5)
    make_trainer(strategy, tmp_path, max_epochs=2).fit(Reading(), make_loader())
    std = 1.3 * 0.5 * CorrelatedNoise(decay=0.8).sensitivity(8, 4, 2) / 16
    assert seen == pytest.approx([std] + [std * math.sqrt(1.64)] * 7)


def test_least_noise_refuses_canaries_in_gradient_space(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, clipping=PerLayerClipping(noise="least"))
    with pytest.raises(ValueError, match="Expected the same noise on all coordinates with canaries in gradient space"):
        make_trainer(strategy, tmp_path, callbacks=[PrivacyAudit(10)]).fit(Classifier(), make_loader())
    strategy = DPStrategy(
        noise_multiplier=1.0, clipping=PerLayerClipping(noise="least"), sampling="cyclic", noise=CorrelatedNoise()
    )
    with pytest.raises(ValueError, match="Expected the same noise on all coordinates with correlated noise"):
        make_trainer(strategy, tmp_path).fit(Classifier(), make_loader())


@pytest.mark.slow
def test_averages_of_weights_cost_nothing(tmp_path: Any) -> None:
    """Lightning's callback averages released weights, and ends with them in the module."""

    class Last(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))

    found = []
    for callbacks in ([], [EMAWeightAveraging(decay=0.5)]):
        weights: list[Tensor] = []
        strategy, module = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, seed=3), Classifier()
        make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[*callbacks, Last()]).fit(module, make_loader())
        final = torch.cat([p.detach().flatten() for p in module.parameters()])
        found.append((strategy.epsilon(), weights, final))
    (epsilon, plain, last), (with_average, steps, average) = found
    assert epsilon == with_average
    torch.testing.assert_close(plain[-1], last)
    torch.testing.assert_close(steps[-1], plain[-1])
    expected = plain[0]
    for weight in plain[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-5)
