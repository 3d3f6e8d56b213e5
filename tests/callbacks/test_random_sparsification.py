"""RandomSparsification under a Trainer: which coordinates move, which carry noise, what is logged, what a resume
sees.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp import DPStrategy
from lightning_dp.callbacks.random_sparsification import RandomSparsification
from lightning_dp.masks import RandomMask
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer

P = 53  # coordinates of the classifier: 6 x 5 + 5 + 5 x 3 + 3


def private(**options: Any) -> DPStrategy:
    return DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-5, "check_per_sample": False, **options})


class Steps(Recorder):
    """Keeps the weights around each optimizer step, in addition to its gradients."""

    def __init__(self, fail_at: int | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        self.weights: list[dict[str, Tensor]] = []
        self.masks: list[int] = []
        self.fail_at, self.stop_at = fail_at, stop_at

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if len(self.before_step) == len(self.weights):
            self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
            self.masks.append(len(trainer.strategy.mechanisms.masks))  # type: ignore[union-attr]
        trainer.should_stop = trainer.global_step == self.stop_at
        if trainer.global_step == self.fail_at:
            raise RuntimeError("stop here")


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def expected_live(step: int, final_rate: float, **options: Any) -> Tensor:
    """The mask of a step, drawn apart from any Trainer."""
    parameters = dict(Classifier().named_parameters())
    live = RandomMask(final_rate, **options).live(step, parameters)
    return flat({n: live.get(n, torch.ones_like(p, dtype=torch.bool)) for n, p in parameters.items()})


def fit(
    tmp_path: Path, callback: RandomSparsification, strategy: DPStrategy | None = None, **options: Any
) -> tuple[Steps, DPStrategy, L.Trainer]:
    steps, strategy = options.pop("steps", None) or Steps(), strategy or private()
    model = options.pop("model", None) or Classifier()
    loader = options.pop("loader", None) or make_loader()
    ckpt_path, more = options.pop("ckpt_path", None), options.pop("more", [])
    trainer = make_trainer(strategy, tmp_path, callbacks=[callback, steps, *more], **options)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return steps, strategy, trainer


def test_masked_weights_stand_still_and_live_ones_move(tmp_path: Path) -> None:
    steps, *_ = fit(tmp_path, RandomSparsification(0.8), max_epochs=5)
    assert len(steps.before_step) == 20
    for step, (before, after) in enumerate(zip(steps.weights, steps.weights[1:], strict=False)):
        live = expected_live(step, 0.8, refresh_steps=4, num_refreshes=5)
        assert int((~live).sum()) == int(0.8 * (step // 4) / 4 * P)
        assert torch.equal(flat(before) != flat(after), live)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "refresh", [1, 2, 3, 5, *(pytest.param(refresh, marks=pytest.mark.slow) for refresh in (4, 6, 7, 8, 9, 10))]
)
@pytest.mark.one_in(4)
def test_live_coordinates_are_noised_and_masked_ones_zero(tmp_path: Path, refresh: int, accumulate: int) -> None:
    """A mask redrawn within a logical batch would release about a quarter of the coordinates without noise."""
    rate, num_steps = 0.5, refresh + 1
    steps, strategy, _ = fit(
        tmp_path,
        RandomSparsification(rate, schedule="constant", refresh=refresh),
        private(microbatch_size=6),
        loader=make_loader(32, batch_size=4),
        max_epochs=-1,
        max_steps=num_steps,
        accumulate_grad_batches=accumulate,
    )
    assert len(steps.before_step) == strategy.ledger.num_steps == num_steps
    for step, gradients in enumerate(steps.before_step):
        live = expected_live(step, rate, schedule="constant", refresh_steps=refresh, num_refreshes=9)
        assert int(live.sum()) == P - int(rate * P)
        assert torch.equal(flat(gradients) != 0, live)


def test_noise_on_live_coordinates_has_its_full_scale(tmp_path: Path) -> None:
    """40 steps on zero gradients, n = 40 x 27: the variance is sigma^2 C^2 / B^2 to 4.9 std (false alarms 1e-6)."""

    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).sum() * 0

    steps, *_ = fit(
        tmp_path,
        RandomSparsification(0.5, schedule="constant", refresh=1),
        private(noise_multiplier=1.5, max_grad_norm=2.0),
        model=Silent(lr=0.0),
        max_epochs=-1,
        max_steps=40,
    )
    released = torch.stack([flat(gradients) for gradients in steps.before_step]).double()
    noise = released[released != 0]
    assert noise.numel() == 40 * 27
    statistic = float((noise * 16 / 3).square().mean()) - 1
    threshold = 4.9 * (2 / noise.numel()) ** 0.5
    assert abs(statistic) < threshold
    assert all(abs((statistic + 1) * scale**2 - 1) > threshold for scale in (2 / 3, 3 / 2))


def test_resumed_run_has_the_masks_of_the_whole_run(tmp_path: Path) -> None:
    def run(**options: Any) -> list[Tensor]:
        callback = RandomSparsification(0.9, refresh=2, seed=3)
        steps, *_ = fit(tmp_path, callback, max_epochs=4, **options)
        return [flat(gradients) != 0 for gradients in steps.before_step]

    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole = run(more=[saving], enable_checkpointing=True)
    resumed = run(ckpt_path=tmp_path / "step=9.ckpt")
    assert len(resumed) == 7
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole[9:], strict=True))
    assert not torch.equal(whole[9], whole[10])


def read_log(tmp_path: Path, key: str) -> list[tuple[int, float]]:
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()))
    return [(int(row["step"]), float(row[key])) for row in rows if row.get(key)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.one_in(2)
def test_rate_and_bytes_are_logged_when_the_mask_changes(tmp_path: Path, accumulate: int) -> None:
    _, _, trainer = fit(
        tmp_path,
        RandomSparsification(0.8),
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    per_epoch = 4 // accumulate
    masked = [0, int(0.4 * P), int(0.8 * P)]
    rates = read_log(tmp_path, "privacy/sparsification_rate")
    assert rates == [(epoch * per_epoch, pytest.approx(masked[epoch] / P)) for epoch in range(3)]
    sent = read_log(tmp_path, "communication/bytes_per_step")
    assert sent == [(epoch * per_epoch, 4 * (P - masked[epoch])) for epoch in range(3)]
    assert float(trainer.callback_metrics["privacy/sparsification_rate"]) == pytest.approx(masked[2] / P)
    assert float(trainer.callback_metrics["communication/bytes_per_step"]) == 4 * (P - masked[2])


def test_two_masks_leave_live_what_both_do(tmp_path: Path) -> None:
    other = RandomSparsification(0.5, schedule="constant", refresh=3, seed=1)
    steps, *_ = fit(tmp_path, RandomSparsification(0.5, schedule="constant", refresh=2), more=[other], max_epochs=2)
    for step, gradients in enumerate(steps.before_step):
        one = expected_live(step, 0.5, schedule="constant", refresh_steps=2, num_refreshes=9)
        two = expected_live(step, 0.5, schedule="constant", refresh_steps=3, num_refreshes=9, seed=1)
        assert torch.equal(flat(gradients) != 0, one & two)


def test_epsilon_and_ledger_are_what_they_are_without_it(tmp_path: Path) -> None:
    _, sparse, _ = fit(tmp_path, RandomSparsification(0.9), max_epochs=3)
    dense = private()
    make_trainer(dense, tmp_path, max_epochs=3).fit(Classifier(), make_loader())
    of_one, of_other = sparse.ledger.state_dict(), dense.ledger.state_dict()
    assert {**of_one, "lineage": ""} == {**of_other, "lineage": ""}
    assert sparse.epsilon() == dense.epsilon()


def test_strategy_holds_the_mask_during_fit_only(tmp_path: Path) -> None:
    steps, strategy, _ = fit(tmp_path, RandomSparsification(0.5))
    assert steps.masks == [1] * 4
    assert not strategy.mechanisms.masks


def test_strategy_lets_go_of_the_mask_when_fit_raises(tmp_path: Path) -> None:
    strategy = private()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, RandomSparsification(0.5), strategy, steps=Steps(fail_at=2))
    assert not strategy.mechanisms.masks


def test_unbounded_run_needs_a_constant_rate(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a bounded run with RandomSparsification, got steps=None"):
        fit(tmp_path, RandomSparsification(0.5), max_epochs=-1)
    callback = RandomSparsification(0.5, schedule="constant")
    steps, *_ = fit(tmp_path, callback, steps=Steps(stop_at=6), max_epochs=-1)
    assert [int((flat(g) == 0).sum()) for g in steps.before_step] == [int(0.5 * P)] * 6


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_dataset())


def test_stream_without_a_length_needs_a_number_of_steps(tmp_path: Path) -> None:
    def run(refresh: Any) -> DPStrategy:
        strategy = private(sampling="shuffle", neighboring_relation="zero_out")
        callback = RandomSparsification(0.5, schedule="constant", refresh=refresh)
        trainer = make_trainer(strategy, tmp_path, max_epochs=-1, max_steps=3, callbacks=[callback])
        trainer.fit(Classifier(), DataLoader(Stream(), batch_size=16))
        return strategy

    with pytest.raises(ValueError, match="known number of steps per epoch with RandomSparsification"):
        run("epoch")
    assert run(2).ledger.num_steps == 3


def test_sparsification_needs_a_private_strategy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="with RandomSparsification, got SingleDeviceStrategy"):
        make_trainer("auto", tmp_path, callbacks=[RandomSparsification(0.5)]).fit(Classifier(), make_loader())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"final_rate": 1.0}, ValueError),
        ({"final_rate": float("nan")}, ValueError),
        ({"schedule": "quadratic"}, ValueError),
        ({"refresh": "batch"}, ValueError),
        ({"refresh": 0}, ValueError),
        ({"refresh": 1.5}, TypeError),
        ({"scope": "channel"}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": "a"}, TypeError),
    ],
)
def test_sparsification_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        RandomSparsification(**{"final_rate": 0.5, **arguments})


def test_layers_are_sparsified_by_themselves(tmp_path: Path) -> None:
    steps, *_ = fit(tmp_path, RandomSparsification(0.6, schedule="constant", scope="layer"))
    sizes = {name: p.numel() for name, p in Classifier().named_parameters()}
    for gradients in steps.before_step:
        assert {n: int((g == 0).sum()) for n, g in gradients.items()} == {n: int(0.6 * s) for n, s in sizes.items()}


def test_frozen_layers_are_not_counted(tmp_path: Path) -> None:
    model = Classifier(nn.Sequential(nn.Linear(6, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, 3)))
    steps, *_ = fit(tmp_path, RandomSparsification(0.5, schedule="constant"), model=model)
    assert [int((flat(gradients) == 0).sum()) for gradients in steps.before_step] == [9] * 4
