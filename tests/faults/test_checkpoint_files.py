"""Checkpoints that were half written, for which the disk was full, or that somebody edited (I7)."""

from __future__ import annotations

import errno
import math
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.strategies.checkpoint_io import PARTIAL, WholeCheckpointIO
from tests.helpers import Classifier, make_loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:The dirpath has changed")
STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one epoch of four steps under Adam."""
    folder = tmp_path_factory.mktemp("trained")
    fit(folder, DPStrategy(noise_multiplier=1.3), save=True)
    return folder / f"epoch=0-step={STEPS}.ckpt"


def fit(
    folder: Path,
    strategy: DPStrategy,
    *,
    save: bool = False,
    resume: Path | None = None,
    weights_only: bool = True,
    **options: Any,
) -> DPStrategy:
    callbacks = [ModelCheckpoint(dirpath=folder, save_top_k=-1)] if save else []
    trainer = make_trainer(strategy, folder, callbacks=callbacks, enable_checkpointing=save, **options)
    module = Classifier(optimizer=torch.optim.Adam)
    trainer.fit(module, make_loader(), ckpt_path=resume, weights_only=weights_only if resume else None)
    return strategy


def entry(state: dict[str, Any]) -> dict[str, Any]:
    return state["lightning_dp"]["ledger"]["entries"][0]


def fewer_steps(state: dict[str, Any]) -> None:
    """A consistent ledger of one step, and a logical step that fits it."""
    entry(state)["num_steps"] = state["lightning_dp"]["ledger"]["num_steps"] = state["lightning_dp"]["step"] = 1


def fewer_steps_everywhere(state: dict[str, Any]) -> None:
    """The same, and Lightning's own count as well; only the optimizer's state still tells."""
    fewer_steps(state)
    state["global_step"] = state["lightning_dp"]["global_step"] = 1


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no_ledger": (lambda s: s.pop("lightning_dp"), "allow_public_checkpoint=True"),
    "emptied": (lambda s: s.update(lightning_dp={}), "is damaged or"),
    "not_a_dictionary": (lambda s: s.update(lightning_dp=[1]), "is damaged or"),
    "unknown_key": (lambda s: s["lightning_dp"].update(note="x"), "is damaged or"),
    "missing_key": (lambda s: s["lightning_dp"].pop("step"), "is damaged or"),
    "ledger_is_text": (lambda s: s["lightning_dp"].update(ledger="x"), "Expected an intact ledger"),
    "negative_steps": (lambda s: entry(s).update(num_steps=-4), "num_steps=-4"),
    "boolean_steps": (lambda s: entry(s).update(num_steps=True), "num_steps=True"),
    "fractional_steps": (lambda s: entry(s).update(num_steps=4.0), "num_steps=4.0"),
    "nan_sigma": (lambda s: entry(s).update(noise_multiplier=math.nan), "noise_multiplier=nan"),
    "infinite_sigma": (lambda s: entry(s).update(noise_multiplier=math.inf), "noise_multiplier=inf"),
    "negative_sigma": (lambda s: entry(s).update(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
    "boolean_sigma": (lambda s: entry(s).update(noise_multiplier=True), "noise_multiplier=True"),
    "text_sigma": (lambda s: entry(s).update(noise_multiplier="1"), "noise_multiplier='1'"),
    "no_rate": (lambda s: entry(s).pop("sample_rate"), "keys"),
    "rate_above_one": (lambda s: entry(s).update(sample_rate=1.5), "sample_rate=1.5"),
    "unknown_kind": (lambda s: entry(s).update(kind="none"), "kind='none'"),
    "entries_gone": (lambda s: s["lightning_dp"]["ledger"].update(entries=[]), "as the entries sum up to"),
    "wrong_total": (lambda s: s["lightning_dp"]["ledger"].update(num_steps=3), "as the entries sum up to"),
    "step_beyond_ledger": (lambda s: s["lightning_dp"].update(step=5), "between 0 and the ledger's 4"),
    "boolean_step": (lambda s: s["lightning_dp"].update(step=True), "step=True"),
    "fewer_than_global_step": (fewer_steps, "at least the 4 steps that the optimizer has taken, got 1"),
    "fewer_than_the_optimizer": (fewer_steps_everywhere, "at least the 4 steps that the optimizer has taken, got 1"),
    "another_moment": (lambda s: s.update(global_step=3), "of global_step=3, got one of 4"),
    "negative_unledgered": (lambda s: s["lightning_dp"].update(unledgered=-1), "unledgered=-1"),
    "damaged_plan": (lambda s: s["lightning_dp"].update(plan={"steps": 3}), "saved plan to be a dictionary"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.one_in(2)
def test_an_edited_checkpoint_is_refused(trained: Path, tmp_path: Path, edit: str) -> None:
    change, message = EDITS[edit]
    checkpoint = torch.load(trained, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    strategy = DPStrategy(noise_multiplier=1.3)
    with pytest.raises(PrivacyError, match=message):
        fit(tmp_path, strategy, resume=tmp_path / "edited.ckpt", max_epochs=2)
    assert strategy.ledger.num_steps == 0


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_checkpoint_cut_short_is_refused(trained: Path, tmp_path: Path, share: float) -> None:
    content = trained.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PrivacyError, match=r"Expected a whole checkpoint, got cut\.ckpt, which cannot be read"):
        fit(tmp_path, DPStrategy(noise_multiplier=1.3), resume=tmp_path / "cut.ckpt", max_epochs=2)


@pytest.mark.parametrize("content", [b"abc", b"a note\n", b"\x00" * 64])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, weights_only: bool) -> None:
    (tmp_path / "note.ckpt").write_bytes(content)
    with pytest.raises(PrivacyError, match=r"Expected a whole checkpoint, got note\.ckpt, which cannot be read"):
        fit(tmp_path, DPStrategy(noise_multiplier=1.3), resume=tmp_path / "note.ckpt", weights_only=weights_only)


def test_classes_that_torch_may_not_load_are_named_by_torch(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": Classifier()}, tmp_path / "object.ckpt")
    with pytest.raises(UnpicklingError, match="not an allowed global"):
        fit(tmp_path, DPStrategy(noise_multiplier=1.3), resume=tmp_path / "object.ckpt")


def test_a_checkpoint_holds_plain_values_beside_its_tensors(trained: Path) -> None:
    """No sum of clipped gradients, no generator: everything of ours is text and numbers, read with
    weights_only=True.
    """

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, (str, int, float, type(None)))

    assert plain(torch.load(trained, weights_only=True)["lightning_dp"])


@pytest.mark.slow
def test_public_steps_before_the_run_are_not_asked_of_the_ledger(tmp_path: Path) -> None:
    """A public checkpoint of four steps, then a private run of four more: its own checkpoint can be resumed."""
    plain = make_trainer(
        "auto", tmp_path, enable_checkpointing=True, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)]
    )
    plain.fit(Classifier(optimizer=torch.optim.Adam), make_loader())
    public = DPStrategy(noise_multiplier=1.3, allow_public_checkpoint=True)
    fit(tmp_path, public, save=True, resume=tmp_path / "epoch=0-step=4.ckpt", max_epochs=2)
    resumed = fit(tmp_path, DPStrategy(noise_multiplier=1.3), resume=tmp_path / "epoch=1-step=8.ckpt", max_epochs=3)
    assert resumed.ledger.num_steps == 8


@pytest.mark.parametrize("io", [None, AsyncCheckpointIO], ids=["default", "asynchronous"])
def test_files_are_written_whole_unless_the_user_brings_a_writer(io: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0)
    if io is not None:
        strategy.checkpoint_io = io()
    inner = strategy.checkpoint_io if io is None else strategy.checkpoint_io.checkpoint_io
    assert isinstance(inner, WholeCheckpointIO)
    own = TorchCheckpointIO()
    assert DPStrategy(noise_multiplier=1.0, checkpoint_io=own).checkpoint_io is own


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_keeps_the_old_checkpoint(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of the second epoch's checkpoint fails over the first one's file; what is in place is the first one."""
    last = tmp_path / "last.ckpt"
    shutil.copy(trained, last)
    before = last.read_bytes()
    strategy = DPStrategy(noise_multiplier=1.3)
    callback = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
    trainer = make_trainer(strategy, tmp_path, callbacks=[callback], enable_checkpointing=True, max_epochs=2)
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match=r"Expected to write the checkpoint last\.ckpt, got 'No space left") as caught:
        trainer.fit(Classifier(optimizer=torch.optim.Adam), make_loader(), ckpt_path=last, weights_only=True)
    assert caught.value.errno == errno.ENOSPC
    assert last.read_bytes() == before
    assert not list(tmp_path.glob(f"*{PARTIAL}"))
    assert strategy.ledger.num_steps == 8
    monkeypatch.undo()
    resumed = fit(tmp_path, DPStrategy(noise_multiplier=1.3), resume=last, max_epochs=2)
    assert resumed.ledger.num_steps == 8


def test_a_limit_on_the_size_of_files_is_a_full_disk(trained: Path, tmp_path: Path) -> None:
    """The system's own refusal, in the middle of the file."""
    place = tmp_path / "small.ckpt"
    WholeCheckpointIO().save_checkpoint({"old": torch.ones(3)}, place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"Expected to write the checkpoint small\.ckpt, got 'File too large'"):
            WholeCheckpointIO().save_checkpoint({"new": torch.ones(4096)}, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(torch.load(place, weights_only=True)) == ["old"]
    assert os.listdir(tmp_path) == ["small.ckpt"]
