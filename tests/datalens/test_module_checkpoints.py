"""Checkpoints, copies and later fits of DataLens: no teachers in them, and one ledger."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dp import EpsilonMonitor, PrivacyError
from lightning_dp.datalens import DataLens, StepsOver
from tests.datalens.helpers import fit, make_model, make_networks, make_records
from tests.datalens.test_module import spent


def saving(tmp_path: Path, **when: Any) -> dict[str, Any]:
    return {
        "enable_checkpointing": True,
        "callbacks": [ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, **when)],
    }


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def test_checkpoints_hold_no_teachers_and_no_records(tmp_path: Path) -> None:
    model = make_model()
    fit(model, tmp_path, **saving(tmp_path))
    checkpoint = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)
    generator = dict(make_networks()[0].named_parameters())
    assert set(checkpoint["state_dict"]) == {f"generator.{name}" for name in generator}
    assert checkpoint["lightning_dp"]["ledger"]["num_steps"] == 4
    # weights, two moments of Adam and its step count a parameter: no further tensor is anywhere
    score = checkpoint.pop("callbacks")  # ModelCheckpoint's, of which it has none
    assert all(tensor.numel() == 1 for tensor in tensors_in(score))
    sizes = sorted(tensor.numel() for tensor in tensors_in(checkpoint))
    assert sizes == sorted([p.numel() for p in generator.values()] * 3 + [1] * len(generator))
    assert "teacher" not in " ".join(name for name, _ in model.named_modules())


def test_pickles_and_copies_hold_no_teacher(tmp_path: Path) -> None:
    model = make_model()
    seen: list[Any] = []

    class Copying(EpsilonMonitor):
        def on_train_batch_end(self, trainer: Any, pl_module: DataLens, *args: Any) -> None:
            assert pl_module._teachers is not None
            seen.extend([copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))])

    fit(model, tmp_path, max_steps=1, callbacks=[Copying()])
    assert model._teachers is None
    assert len(seen) == 2
    for other in seen:
        assert other._teachers is None
        assert other.ledger.num_steps == 1
        torch.testing.assert_close(other.generator.state_dict(), model.generator.state_dict())


def test_resumed_epsilon_equals_the_uninterrupted_runs(tmp_path: Path) -> None:
    whole = make_model(target_epsilon=2.0)
    fit(whole, tmp_path / "whole", max_epochs=4)
    part = make_model(target_epsilon=2.0)
    fit(part, tmp_path, max_epochs=4, **saving(tmp_path, every_n_epochs=1))
    resumed = make_model(target_epsilon=2.0)
    trainer = fit(resumed, tmp_path, max_epochs=4, resume=tmp_path / "epoch=1-step=8.ckpt")
    assert resumed.ledger.num_steps == resumed.steps_taken == trainer.global_step == 16
    assert resumed.plan.noise_std == whole.plan.noise_std
    assert resumed.epsilon() == whole.epsilon()
    longer = make_model(target_epsilon=2.5)
    fit(longer, tmp_path, max_epochs=6, resume=tmp_path / "epoch=1-step=8.ckpt")
    assert 2.475 <= longer.epsilon() <= 2.5
    assert longer.ledger.num_steps == 24


def test_a_released_checkpoint_knows_its_epsilon(tmp_path: Path) -> None:
    model = make_model()
    fit(model, tmp_path, **saving(tmp_path))
    path = tmp_path / "epoch=0-step=4.ckpt"
    networks = dict(zip(("generator", "discriminator"), make_networks(), strict=True))
    loaded = DataLens.load_from_checkpoint(path, weights_only=True, **networks)
    assert loaded.epsilon() == pytest.approx(spent(4), rel=1e-9)
    assert loaded.settings == model.settings
    draws = [m.generate(5, generator=torch.Generator().manual_seed(1))[0] for m in (model, loaded)]
    torch.testing.assert_close(*draws)


def test_checkpoints_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    fit(make_model(), tmp_path, **saving(tmp_path))
    path = tmp_path / "epoch=0-step=4.ckpt"
    with pytest.raises(PrivacyError, match="60 records of the ledger's dataset, got 59"):
        fit(make_model(), tmp_path, max_epochs=2, resume=path, loader=StepsOver(make_records(59), 4))
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["lightning_dp"]
    torch.save(checkpoint, path)
    with pytest.raises(PrivacyError, match="with a privacy ledger, got one without"):
        fit(make_model(), tmp_path, max_epochs=2, resume=path)


def test_a_second_fit_goes_on_with_the_ledger(tmp_path: Path) -> None:
    model = make_model()
    fit(model, tmp_path)
    fit(model, tmp_path)
    assert model.ledger.num_steps == 8
    assert model.steps_taken == 4


def test_another_dataset_is_refused_in_a_later_fit_too(tmp_path: Path) -> None:
    model = make_model()
    fit(model, tmp_path, **saving(tmp_path))
    networks = dict(zip(("generator", "discriminator"), make_networks(), strict=True))
    loaded = DataLens.load_from_checkpoint(tmp_path / "epoch=0-step=4.ckpt", weights_only=True, **networks)
    for later in (model, loaded):
        with pytest.raises(PrivacyError, match="60 records of the ledger's dataset, got 59"):
            fit(later, tmp_path, loader=StepsOver(make_records(59), 4))
        assert later.ledger.num_steps == 4
