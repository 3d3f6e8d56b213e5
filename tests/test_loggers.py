"""Epsilon in the loggers that people use, read back from their files, and the privacy card next to them."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_dp import DPStrategy, EpsilonMonitor
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, make_loader, make_trainer

pytestmark = pytest.mark.usefixtures("no_picture")

Points = dict[str, list[tuple[int, float]]]
KEYS = ("epsilon", "privacy/delta", "privacy/noise_multiplier")


def read_csv(directory: Path) -> Points:
    rows = list(csv.DictReader((directory / "metrics.csv").read_text().splitlines()))
    return {key: [(int(row["step"]), float(row[key])) for row in rows if row.get(key)] for key in KEYS}


def read_tensorboard(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in KEYS}


def read_mlflow(directory: Path) -> Points:
    def points(key: str) -> list[tuple[int, float]]:
        lines = (directory / "metrics" / key).read_text().splitlines()
        return [(int(step), float(value)) for _, value, step in map(str.split, lines)]

    return {key: points(key) for key in KEYS}


def read_wandb(directory: Path) -> Points:
    """From the log of an offline run: blocks of 32 KiB after a header of 7 bytes, records with checksum, size and
    kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.parents[1].glob("wandb/offline-run-*/run-*.wandb")
    content, place, whole = path.read_bytes(), 7, b""
    found: Points = {key: [] for key in KEYS}
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little for a header: the rest of the block is empty
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # complete, or the last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for key in found.keys() & items.keys():
                found[key].append((items["trainer/global_step"], items[key]))
    return found


LOGGERS: dict[str, tuple[Callable[[Path], Logger], Callable[[Path], Points]]] = {
    "csv": (lambda root: CSVLogger(root), read_csv),
    "tensorboard": (lambda root: TensorBoardLogger(root), read_tensorboard),
    "mlflow": (lambda root: MLFlowLogger(tracking_uri=root.as_uri()), read_mlflow),
    "wandb": (lambda root: WandbLogger(save_dir=root, project="private", offline=True), read_wandb),
}


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """No logger talks to anybody."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    "name", [*("csv", "tensorboard"), *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlflow", "wandb"))]
)
def test_epsilon_is_in_the_loggers_files(tmp_path: Path, name: str) -> None:
    make, read = LOGGERS[name]
    strategy = DPStrategy(noise_multiplier=1.3, target_delta=1e-5)
    logger = make(tmp_path)
    trainer = make_trainer(
        strategy,
        tmp_path,
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[EpsilonMonitor(every_n_steps=3)],
    )
    trainer.fit(Classifier(), make_loader())
    if name == "wandb":
        import wandb

        wandb.teardown()
    (card,) = tmp_path.rglob("privacy_card.json")
    directory = card.parent
    assert json.loads(card.read_text())["epsilon"] == pytest.approx(spent(8), rel=1e-9)
    assert str(logger.version) in directory.name
    found = read(directory)
    assert found["epsilon"] == [(step - 1, pytest.approx(spent(step), rel=1e-5)) for step in (1, 4, 7, 8)]
    assert found["privacy/delta"][-1] == (7, pytest.approx(1e-5))
    assert found["privacy/noise_multiplier"][-1] == (7, pytest.approx(1.3))


def spent(steps: int) -> float:
    """Epsilon of so many steps at q = 1/4, straight from a ledger of its own."""
    ledger = Ledger()
    ledger.record(PrivacyEvent.poisson(noise_multiplier=1.3, sample_rate=0.25), steps)
    return make_accountant("pld").epsilon(ledger, 1e-5)
