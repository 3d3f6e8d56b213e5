"""Checks of a build: each raises AssertionError, and says what it saw, where a guarantee does not hold.

They look at runs from outside (what enters the noise, what leaves it, what the optimizer gets), so that they hold
whatever the build is made of. ``broken.py`` lists builds that each must catch; false-alarm rates are per call on a
sound build.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import CorrelatedNoise, DPStrategy, RandomSparsification
from lightning_dp.sampling import private_dataloader
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.reduction import AllReduce
from tests.accounting.allocation_reference import sampled_delta, sampled_ratios
from tests.auditing.models import DELTA, Idle, audited
from tests.helpers import Recorder, make_loader, make_trainer


class Watching(DPStrategy):
    """Writes down, for every release: what entered the noise, what left it, and under which masks samples were
    collected.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"target_delta": DELTA, "check_per_sample": False, **options})
        self.clean: list[Tensor] = []
        self.noisy: list[Tensor] = []
        self.masks: list[list[Tensor | None]] = [[]]
        self.drawn_stds: list[float] = []

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        step: Any = self._fit.step
        step.noise_comes_first = lambda: False  # so that there is a sum without noise to look at
        before(step, "collect", lambda optimizer=0: self.masks[-1].append(active(step.accumulators[optimizer])))
        before(step.noise, "add", lambda accumulator, release, **_: self.clean.append(accumulator.gradient.clone()))
        before(step.noise, "add", lambda accumulator, release, **_: self.drawn_stds.append(release.drawn_std))
        after(step.reduction, "reduce", lambda accumulator: self.noisy.append(accumulator.flat.clone()))
        after(step, "release", lambda optimizer=0: self.masks.append([]))


def active(accumulator: Any) -> Tensor | None:
    return None if accumulator.active is None else accumulator.active.clone()


def before(owner: Any, name: str, look: Any) -> None:
    call = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: (look(*args, **kwargs), call(*args, **kwargs))[1])


def after(owner: Any, name: str, look: Any) -> None:
    call = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: (call(*args, **kwargs), look(*args, **kwargs))[0])


class BothRanks(AllReduce):
    """Adds what the other one of two processes sends: its share of the noise, on a sum of no samples."""

    step: Any

    def agree(self, flag: bool) -> bool:
        return flag

    def reduce(self, accumulator: Accumulator) -> None:
        peer = self.make_accumulator(accumulator.parameters, accumulator.clipping, accumulator.num_statistics)
        ReleaseNoise(self.step.noise.source, self).add(peer, self.step.releases[0])
        accumulator.flat.add_(peer.flat)

    def each_rank(self, values: Tensor) -> Tensor:
        """Return the same facts for both."""
        return values.expand(2, *values.shape)


class TwoRanks(Watching):
    """Plays both of two processes; the other one drew no sample."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.world_size = 2

    def make_reduction(self) -> AllReduce:
        return BothRanks(0, 2, torch.device("cpu"))

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self._fit.step.reduction.step = self._fit.step


class LossIsLinear(L.LightningModule):
    """The gradient of a record is the record."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(num_features, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(strategy: Any, tmp_path: Path, module: Any = None, loader: Any = None, epochs: int = 1, **options: Any) -> Any:
    trainer = make_trainer(strategy, tmp_path, max_epochs=epochs, **options)
    trainer.fit(module or Idle(2000), loader or make_loader(batch_size=16))
    return trainer


def check_the_audit_stays_below_the_claim(tmp_path: Path) -> None:
    """1,000 gradient canaries at q = 1 and mu = 2 (epsilon 10.0 at 1e-5): the bound is in [0.3, 1] of the claim.

    False alarm below 1.1e-5: confidence 1 - 1e-5 above; below, see ``test_privacy_audit``. Two thirds of the noise (mu
    = 3) give a bound above 10.0 but with probability 9e-7.
    """
    audit, _ = audited(tmp_path, strategy=DPStrategy(noise_multiplier=2.0, target_delta=DELTA, check_per_sample=False))
    assert audit.result is not None
    bound, claim = audit.result.epsilon_lower, audit.result.claimed_epsilon
    assert bound <= claim, f"the audit's bound {bound:.3g} is above the claim {claim:.3g}"
    assert bound >= 0.3 * claim, f"the audit's bound {bound:.3g} is below 0.3 of the claim {claim:.3g}: it has no power"


def check_one_record_moves_the_sum_by_at_most_the_bound(tmp_path: Path) -> None:
    """Eight records that pull one way and a ninth, huge, that pulls the other way: with it the sum moves by C at most.
    Exact.
    """
    for ninth in (-1e3, -5.0, -0.5, 1e30, math.inf, math.nan):
        sums = []
        for records in ([5.0] * 8, [5.0] * 8 + [ninth]):
            features = torch.zeros(len(records), 3)
            features[:, 0] = torch.tensor(records)
            strategy = Watching(noise_multiplier=1.0, max_grad_norm=1.5)
            loader = DataLoader(TensorDataset(features), batch_size=len(records))
            fit(strategy, tmp_path, LossIsLinear(3), loader)
            sums.append(strategy.clean[0])
        moved = float((sums[1] - sums[0]).norm())
        assert moved <= 1.5 * (1 + 1e-5), f"one record moves the sum by {moved:.3g}, the bound is 1.5"


def check_one_user_moves_the_sum_by_at_most_the_bound(tmp_path: Path) -> None:
    """Eight users and a ninth of seven records, in microbatches of two records: with it the sum moves by C at most.
    Exact.
    """
    sums = []
    for own in (0, 7):
        features = torch.zeros(8 + own, 3)
        features[:8, 0], features[8:, 0] = 5.0, -5.0
        ids = [min(record, 8) for record in range(8 + own)]
        strategy = Watching(noise_multiplier=1.0, max_grad_norm=1.5, microbatch_size=2, unit=ids, records_per_unit=7)
        fit(strategy, tmp_path, LossIsLinear(3), DataLoader(TensorDataset(features), batch_size=len(set(ids))))
        sums.append(strategy.clean[0])
    moved = float((sums[1] - sums[0]).norm())
    assert moved <= 1.5 * (1 + 1e-5), f"one user moves the sum by {moved:.3g}, the bound is 1.5"


def check_records_come_back_as_the_noise_accounts_for(tmp_path: Path) -> None:
    """8 passes of 4 cyclic batches of 64 one-hot records: no record is in steps of which C makes more than sens(C).
    Exact.
    """
    strategy = Watching(noise_multiplier=1.0, sampling="cyclic", noise=CorrelatedNoise(decay=0.9))
    loader = DataLoader(TensorDataset(torch.eye(64)), batch_size=16)
    fit(strategy, tmp_path, LossIsLinear(64), loader, epochs=8)
    known = strategy.plan.correlation
    present = (torch.stack(strategy.clean) != 0).double()  # steps x records
    assert present.sum(0).tolist() == [8] * 64
    matrix = scipy.linalg.toeplitz(known.noise.coefficients(32), [1.0] + [0.0] * 31)
    largest = float((torch.from_numpy(matrix) @ present).norm(dim=0).max())
    covered = known.sensitivity
    assert largest <= covered * (1 + 1e-9), f"a record has sensitivity {largest:.3g}, the noise covers {covered:.3g}"
    assert largest >= covered * (1 - 1e-9), f"the noise covers {covered:.3g}, no record has more than {largest:.3g}"


def check_shuffled_passes_cost_what_they_spend(tmp_path: Path) -> None:
    """20 passes of 5 shuffled batches at sigma 1: 200,000 drawn passes do not exceed delta at the claimed epsilon.

    False alarm below 1e-7 per direction: 5.3 standard errors.
    """
    delta, strategy = (
        0.01,
        DPStrategy(noise_multiplier=1.0, target_delta=0.01, sampling="shuffle", check_per_sample=False),
    )
    fit(strategy, tmp_path, Idle(10), make_loader(60, 12), epochs=20)
    ratios = sampled_ratios(1.0, 5, 20, 200_000, np.random.default_rng(3))
    for direction in ("add", "remove"):
        mean, error = sampled_delta(ratios, direction, strategy.epsilon())
        assert mean - 5.3 * error <= delta, f"at the claimed epsilon drawn passes have delta {mean:.3g} ({direction})"


def check_the_divisor_is_the_expected_batch_size(tmp_path: Path) -> None:
    """p.grad is the noisy sum over 16 in each of 12 Poisson batches of 64 records, whatever their size. Exact."""
    strategy, recorder = Watching(noise_multiplier=1.0), Recorder()
    fit(strategy, tmp_path, epochs=3, callbacks=[recorder])
    for noisy, seen in zip(strategy.noisy, recorder.before_step, strict=True):
        ratio = float(noisy.norm() / torch.cat([g.flatten() for g in seen.values()]).norm())
        assert abs(ratio - 16) < 1e-3, f"the noisy sum was divided by {ratio:.4g}, the expected batch size is 16"


def check_one_mask_holds_for_a_logical_batch(tmp_path: Path) -> None:
    """Microbatches of 4, half of the coordinates masked at random at every step: all of a batch see one mask, batches
    differ.

    Exact, but for two masks of 1,000 of 2,053 coordinates being equal by chance: below 1e-300.
    """
    strategy = Watching(noise_multiplier=1.0, microbatch_size=4)
    mask = RandomSparsification(final_rate=0.5, schedule="constant", refresh=1)
    fit(strategy, tmp_path, epochs=2, callbacks=[mask])
    batches = [masks for masks in strategy.masks if masks]
    assert any(len(masks) > 1 for masks in batches)
    for masks in batches:
        same = all(live is not None and masks[0] is not None and torch.equal(live, masks[0]) for live in masks)
        assert same, "the mask changed within a logical batch"
    first = [masks[0] for masks in batches]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(first)), "the mask never changes"


def check_every_coordinate_carries_its_noise(tmp_path: Path) -> None:
    """2,053 coordinates, 4 steps: the noise has std sigma C, z < 5 (false alarm 6e-7), and is on every one of them."""
    strategy = Watching(noise_multiplier=0.8, max_grad_norm=1.5)
    fit(strategy, tmp_path)
    _check_std(torch.stack(strategy.noisy) - torch.stack(strategy.clean), 0.8 * 1.5)


def check_noise_shares_of_ranks_add_up(tmp_path: Path) -> None:
    """Two processes: together they add noise of std sigma C, z < 5 (false alarm 6e-7); twice or half of it is sqrt(2)
    off.
    """
    strategy = TwoRanks(noise_multiplier=0.8, max_grad_norm=1.5)
    fit(strategy, tmp_path)
    _check_std(torch.stack(strategy.noisy) - torch.stack(strategy.clean), 0.8 * 1.5)


def _check_std(noise: Tensor, std: float) -> None:
    standard = noise.double() / std
    assert bool((noise != 0).all()), f"{int((noise == 0).sum())} coordinates carry no noise"
    z = float((standard.square().sum() - standard.numel()) / math.sqrt(2 * standard.numel()))
    assert abs(z) < 5, f"the noise has {float(standard.std()):.3g} times its std (z = {z:.3g})"


def check_noise_is_new_at_every_step(tmp_path: Path) -> None:
    """Correlation of the noise between any two of 8 steps over 2,053 coordinates: below 6 / sqrt(n), false alarm 28 x
    2e-9.
    """
    strategy = Watching(noise_multiplier=1.0)
    fit(strategy, tmp_path, epochs=2)
    noise = torch.stack(strategy.noisy) - torch.stack(strategy.clean)
    correlation = torch.corrcoef(noise.double())
    largest = float((correlation - torch.eye(len(noise))).abs().max())
    assert largest < 6 / math.sqrt(noise.shape[1]), f"noise of two steps has correlation {largest:.3g}"


def check_ranks_draw_independently(tmp_path: Path) -> None:
    """Positions drawn by both of two ranks at once, 50 batches of 1,000 records per rank at q = .2: z < 6, false alarm
    2e-9.
    """
    loaders = [private_dataloader(DataLoader(range(2000), batch_size=200), rank=rank, world_size=2) for rank in (0, 1)]
    drawn = torch.zeros(2, 50, 1000, dtype=torch.float64)
    for rank, loader in enumerate(loaders):
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for step, batch in enumerate(itertools.islice(batches, 50)):
            drawn[rank, step, batch.microbatches[0][1] // 2] = 1.0
    both, expected = float((drawn[0] * drawn[1]).sum()), 50 * 1000 * 0.04
    z = (both - expected) / math.sqrt(expected * (1 - 0.04))
    assert abs(z) < 6, f"two ranks drew the same positions {both:.0f} times, {expected:.0f} expected (z = {z:.3g})"


def check_every_release_is_in_the_ledger(tmp_path: Path) -> None:
    """As many entries as optimizer steps, with the sample rate and the noise multiplier of the run. Exact."""
    strategy = Watching(noise_multiplier=1.3)
    trainer = fit(strategy, tmp_path, epochs=2)
    assert len(strategy.noisy) == trainer.global_step == 8
    recorded = strategy.ledger.num_steps
    assert recorded == 8, f"the ledger holds {recorded} of 8 releases"
    assert strategy.ledger.mechanisms() == {(0.25, 1.3, 1): 8}, f"the ledger holds {strategy.ledger.mechanisms()}"
