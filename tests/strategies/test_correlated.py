"""Correlated noise under a Trainer and in a loop: what is drawn, in which order of the data, what it costs, what is
refused.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import lightning as L
import pytest
import torch
from scipy.linalg import toeplitz
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    CorrelatedNoise,
    DPStrategy,
    NoiseScheduler,
    PerLayerClipping,
    PrivacyAudit,
    PrivacyBudget,
    PrivacyError,
    RandomSparsification,
    SwitchToDP,
    make_private,
)
from lightning_dp.accounting import gaussian_epsilon
from lightning_dp.clipping import Clipping
from tests.auditing.checks import Watching
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_manual import GAN

DECAY = 0.8
STREAMS = pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")


def make_strategy(**options: Any) -> DPStrategy:
    defaults: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "sampling": "cyclic",
        "noise": CorrelatedNoise(decay=DECAY),
        "check_per_sample": False,
    }
    return DPStrategy(**{**defaults, **options})


class Nothing(Classifier):
    """No gradient at all: what its optimizer sees is noise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0


class Stream(IterableDataset):
    """The records of the dataset in their order."""

    def __init__(self, length: int = 64, yields: int = 64) -> None:
        self.data, self.length, self.yields = make_dataset(), length, yields

    def __iter__(self) -> Any:
        return (self.data[index % 64] for index in range(self.yields))

    def __len__(self) -> int:
        return self.length


def released(
    strategy: DPStrategy, tmp_path: Any, *, module: Any = None, loader: Any = None, callbacks: Any = (), **options: Any
) -> Tensor:
    """The gradients of all steps, shape (steps, coordinates)."""
    recorder = Recorder()
    trainer = make_trainer(strategy, tmp_path, callbacks=[*callbacks, recorder], **{"max_epochs": 4, **options})
    trainer.fit(module or Nothing(lr=0.0), loader or make_loader())
    return torch.stack([torch.cat([g.flatten() for g in seen.values()]) for seen in recorder.before_step])


def z_of(values: Tensor, std: float) -> float:
    squares = (values.double() / std).square()
    return float((squares.sum() - squares.numel()) / math.sqrt(2 * squares.numel()))


def test_noise_is_that_of_the_planned_mechanism(tmp_path: Any) -> None:
    """100 steps of 53 coordinates: y = C v has independent entries of std sigma sens(C) C / B; z < 5 (false alarm
    6e-7), and not at other scales.
    """
    strategy = make_strategy(noise_multiplier=0.7, max_grad_norm=1.5)
    found = released(strategy, tmp_path, max_epochs=25).double()
    known = strategy.plan.correlation
    assert (known.steps, known.separation, known.passes) == (100, 4, 25)
    draws = torch.zeros_like(found)
    for step, row in enumerate(found):
        draws[step] = row + (DECAY * draws[step - 1] if step else 0.0)
    std = 0.7 * 1.5 * CorrelatedNoise(decay=DECAY).sensitivity(100, 4, 25) / 16
    for wrong in (1.0, 2 / 3, 3 / 2):
        assert (abs(z_of(draws, std * wrong)) < 5) == (wrong == 1.0), wrong
    products = (draws[1:] * draws[:-1]).sum() / std**2 / math.sqrt(draws[1:].numel())
    assert abs(float(products)) < 5  # one step's draw says nothing of the next one's
    assert float((found[1:] * found[:-1]).sum()) < 0  # what is released is correlated


def test_the_whole_run_is_one_gaussian(tmp_path: Any) -> None:
    strategy = make_strategy()
    released(strategy, tmp_path)
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 1}
    assert strategy.ledger.num_steps == 16
    assert strategy.epsilon(1e-5) == pytest.approx(gaussian_epsilon(1.0, 1e-5), rel=2e-3)
    text = strategy.privacy_statement()
    assert "cyclic batches without amplification" in text
    assert "noise: correlated between steps (decay 0.8), one Gaussian for the whole run of 16 steps" in text


@pytest.mark.parametrize("clipping", ["flat", PerLayerClipping(noise="equal"), "automatic", "psac"])
@pytest.mark.one_in(2)
def test_runs_on_neighbouring_data_differ_by_the_sensitivity(tmp_path: Any, clipping: str | Clipping) -> None:
    """A record that contributes nothing in one of them: C times the difference is at most drawn_std / sigma, at one
    record so.
    """
    sums, stds = [], set()
    for scale in (1e3, 0.0):
        features, _ = make_dataset().tensors
        features[:1] *= scale
        strategy = Watching(
            noise_multiplier=1.3,
            clipping=clipping,
            sampling="cyclic",
            neighboring_relation="zero_out",
            noise=CorrelatedNoise(decay=DECAY),
        )
        make_trainer(strategy, tmp_path, max_epochs=4).fit(Linear(), DataLoader(TensorDataset(features), batch_size=16))
        sums.append(torch.stack(strategy.clean).double())
        stds |= set(strategy.drawn_stds)
    (std,) = stds
    moved = sums[0] - sums[1]
    row = [1.0] + [0.0] * (len(moved) - 1)
    matrix = torch.from_numpy(toeplitz(CorrelatedNoise(decay=DECAY).coefficients(len(moved)), row))
    assert float((matrix @ moved).norm()) <= std / 1.3 * (1 + 1e-5)
    first = int(moved.norm(dim=1).nonzero()[0])  # the earlier a record comes, the more of it is in later sums
    assert float((matrix @ moved).norm()) >= (0.6 if first else 0.9) * std / 1.3


class Linear(L.LightningModule):
    """Two layers whose gradient is zero for a record of zeros, and long for a long one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(4, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.second(self.first(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_auto_is_calibrated_to_the_target(tmp_path: Any) -> None:
    strategy = make_strategy(noise=CorrelatedNoise(), noise_multiplier=None, target_epsilon=2.0)
    released(strategy, tmp_path)
    assert 0.99 * 2.0 <= strategy.epsilon() <= 2.0
    known = strategy.plan.correlation
    assert known.noise == CorrelatedNoise().planned(16, 4, 4)
    assert known.sensitivity * known.noise.rmse(16) < CorrelatedNoise(decay=0.0).loss(16, 4, 4)


def test_every_unit_comes_back_after_one_pass(tmp_path: Any) -> None:
    """The batches of every pass are the same; a pass that is cut short goes on where it stopped."""

    class Seen(Nothing):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.batches: list[list[float]] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.batches.append(sorted(batch[0][:, 0].tolist()))

    for cut, steps in ((1.0, 12), (3, 9)):
        module = Seen()
        released(make_strategy(), tmp_path, module=module, max_epochs=3, limit_train_batches=cut)
        assert len(module.batches) == steps
        assert module.batches[4:] == module.batches[:-4]
        assert sorted(itertools.chain(*module.batches[:4])) == sorted(make_dataset().tensors[0][:, 0].tolist())


@STREAMS
@pytest.mark.parametrize("options", [{"fixed_order": True}, {}], ids=["several passes", "one pass"])
def test_a_stream_in_a_fixed_order(tmp_path: Any, options: Any) -> None:
    strategy = make_strategy(sampling="shuffle", neighboring_relation="zero_out", **options)
    found = released(strategy, tmp_path, loader=DataLoader(Stream(), batch_size=16), max_epochs=4 if options else 1)
    known = strategy.plan.correlation
    assert (known.steps, known.separation, known.passes) == ((16, 4, 4) if options else (4, 4, 1))
    assert len(found) == known.steps
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 1}


@STREAMS
def test_a_stream_that_begins_again_too_early_is_refused(tmp_path: Any) -> None:
    """It says 64 records and yields 32: each comes back after half of the separation."""
    strategy = make_strategy(sampling="shuffle", neighboring_relation="zero_out", fixed_order=True)
    with pytest.raises(PrivacyError, match="The stream began again 2 steps into a pass of 4"):
        released(strategy, tmp_path, loader=DataLoader(Stream(yields=32), batch_size=16))
    strategy = make_strategy(sampling="shuffle", neighboring_relation="zero_out")
    with pytest.raises(ValueError, match="Expected fixed_order=True and a stream with a length for 16 steps"):
        released(strategy, tmp_path, loader=DataLoader(Stream(), batch_size=16))


@pytest.mark.parametrize(
    ("callbacks", "options", "match"),
    [
        ([NoiseScheduler("step", factor=0.9)], {}, "Expected the same noise multiplier in all steps"),
        ([SwitchToDP(1)], {}, "Expected the same noise multiplier in all steps"),
        ([RandomSparsification(0.5, refresh=2, schedule="constant")], {}, "Expected one mask for the whole run"),
        ([AdaptiveClipping()], {}, "Expected a bound without noisy counts"),
        ([PrivacyAudit(10)], {}, "Expected sampling='poisson' with canaries in gradient space"),
        ([], {"max_epochs": -1}, "Expected a bounded run with correlated noise"),
    ],
    ids=["schedule", "plain steps", "mask", "counts", "canaries", "no end"],
)
def test_what_does_not_combine_is_refused(tmp_path: Any, callbacks: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        released(make_strategy(), tmp_path, callbacks=callbacks, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampling": "poisson"}, "Expected data in a fixed order with correlated noise, got sampling='poisson'"),
        ({"secure_rng": True}, "Expected secure_rng=False with correlated noise"),
    ],
)
def test_settings_that_do_not_combine_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_strategy(**options)
    with pytest.raises(TypeError, match="Expected noise to be a CorrelatedNoise"):
        make_strategy(noise=0.95)


def test_shuffled_order_and_manual_optimization_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match='Expected data in a fixed order, got sampling="shuffle"'):
        released(make_strategy(sampling="shuffle"), tmp_path)
    with pytest.raises(ValueError, match="Expected automatic optimization with one private optimizer"):
        released(make_strategy(), tmp_path, module=GAN())


def test_bounds_may_change_and_masks_may_stay(tmp_path: Any) -> None:
    callbacks = [ClippingScheduler("step", factor=0.5), RandomSparsification(0.5, refresh=100, schedule="constant")]
    found = released(make_strategy(), tmp_path, callbacks=callbacks)
    assert (found != 0).sum(1).tolist() == [27] * 16
    assert float(found[12:].norm()) < 0.3 * float(found[:4].norm())
    auto = AutoThreshold(2.0)
    released(make_strategy(), tmp_path, callbacks=[auto, PrivacyBudget(100.0)])


def test_cyclic_batches_cost_one_gaussian_per_pass(tmp_path: Any) -> None:
    strategy = make_strategy(noise=None)
    released(strategy, tmp_path, max_epochs=3)
    assert strategy.ledger.mechanisms() == {(1.0, 1.0, 1): 3}


def loop(**options: Any) -> Any:
    module = Nothing(lr=0.0)
    return make_private(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        make_loader(),
        lambda model, batch: model(torch.zeros_like(batch[0])).sum(1).mean() * 0.0,
        noise_multiplier=1.0,
        target_delta=1e-3,
        sampling="cyclic",
        noise=CorrelatedNoise(decay=DECAY),
        **options,
    )


def test_a_loop_takes_its_batches_in_order(tmp_path: Any) -> None:
    with loop(epochs=3) as private:
        for batch in private.loader:
            private.step(batch)
        state = private.state_dict()
        weights = {name: value.clone() for name, value in private._model.state_dict().items()}
        ahead = iter(private.loader)
        next(ahead)
        with pytest.raises(PrivacyError, match="Logical step 4 got the batch at position 5"):
            private.step(next(ahead))
    with loop(epochs=3) as resumed:
        resumed._model.load_state_dict(weights)
        resumed.load_state_dict(state)
        for _ in range(2):
            for batch in resumed.loader:
                resumed.step(batch)
        assert resumed.ledger.num_steps == 12
        assert resumed.ledger.mechanisms() == {(1.0, 1.0, 1): 1}
