"""Sharded checkpoints: folders that stay complete if a process dies at any moment, with the ledger next to the
weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.optim import Optimizer

from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.strategies.checkpoint_io import PARTIAL

#: Suffix of the folder that is being replaced; it is restored if a crash left no folder in its place.
OLD = ".old"
#: File of a folder that holds everything but tensors; it is written last.
META = "meta.pt"
#: Beginning of the name under which each rank writes the mark of the ledger into its own file.
_PART = f"{saved.KEY}_part_"


def save(checkpoint: dict[str, Any], path: Path, *, rank: int, barrier: Callable[[], None]) -> None:
    """Write a checkpoint to a folder, on every rank.

    Each rank writes its part of the weights into a new folder next to the old one. The first rank then writes
    everything else, and moves the new folder into the place of the old one. The privacy state is written twice: with
    the weights, and with everything else. A mark of the ledger is in the files of every rank.

    **Guarantee**: if any process dies at any moment while an old folder exists, :func:`recover` leaves the complete old
    or the complete new folder at ``path``.

    Args:
        checkpoint: Lightning's checkpoint with the privacy state; its tensors are removed.
        path: path of the folder.
        rank: this process.
        barrier: returns once all ranks have called it.
    """
    partial, is_first = _beside(path, PARTIAL), rank == 0
    if is_first:
        recover(path)
        _remove(partial)
        partial.mkdir(parents=True)
    barrier()
    state = {"state_dict": checkpoint.pop("state_dict"), saved.KEY: _bytes_of(checkpoint[saved.KEY])}
    state[f"{_PART}{rank}"] = _mark_of(checkpoint[saved.KEY])
    for index, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
        state[f"optimizer_{index}"] = optimizer_state
    save_parts(state, checkpoint_id=partial)
    barrier()
    if is_first:
        with (partial / f"{META}{PARTIAL}").open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        (partial / f"{META}{PARTIAL}").replace(partial / META)
        _remove(_beside(path, OLD))
        if path.exists():
            path.replace(_beside(path, OLD))
        partial.replace(path)
        _remove(_beside(path, OLD))
    barrier()


def recover(path: Path) -> None:
    """Finish a replacement that a dying process interrupted: use the new folder if it is complete, else the old one."""
    if path.exists():
        return
    partial, old = _beside(path, PARTIAL), _beside(path, OLD)
    if (partial / META).exists():
        partial.replace(path)
    elif old.exists():
        old.replace(path)


def check(checkpoint: dict[str, Any], path: Path) -> None:
    """Check that the files of all ranks and the ledger of a folder were written together; every rank calls it.

    Raises:
        PrivacyError: the ledger in ``checkpoint`` is not the ledger that was written with the weights.
    """
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    if saved.KEY not in found and saved.KEY not in checkpoint:
        return  # not from a private strategy: another check handles this
    names = [name for name in found if name == saved.KEY or name.startswith(_PART)]
    held = {name: torch.empty(getattr(found[name], "size", 0), dtype=torch.uint8) for name in names}
    state = checkpoint.get(saved.KEY)
    expected = {} if state is None else {name: _mark_of(state) for name in names} | {saved.KEY: _bytes_of(state)}
    read = expected.keys() == held.keys() and _reads(held, path)
    if not read or not all(torch.equal(held[name], expected[name]) for name in held):
        raise PrivacyError(
            f"Expected the ledger that was written with the weights of {path.name}, got another one in {META} or in "
            "the file of a rank. Files of two checkpoints were mixed, so what the weights have spent is unknown: use "
            "an intact checkpoint."
        )


def read_meta(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """Return the metadata file of a folder: everything that is no tensor."""
    meta: dict[str, Any] = torch.load(path / META, map_location="cpu", weights_only=weights_only)
    return meta


def _reads(held: dict[str, Tensor], path: Path) -> bool:
    """Read tensors of a folder; tell whether their sizes are those that the folder states."""
    try:
        load(held, checkpoint_id=path)
    except CheckpointException:
        return False
    return True


def find_stateless(path: Path, weights_only: bool | None) -> list[bool]:
    """Tell, for each optimizer of a checkpoint in one file, whether it has no state, as SGD without momentum."""
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    return [not state["state"] for state in checkpoint.get("optimizer_states", [])]


def load_groups(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer without state the settings of its parameter groups, such as the learning rate.

    Args:
        optimizer: holds the same parameters, in the same groups.
        state: its state in a checkpoint in one file.
    """
    groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
    optimizer.load_state_dict(
        {"state": {}, "param_groups": [{**then, "params": now["params"]} for now, then in groups]}
    )


def _bytes_of(state: dict[str, Any]) -> Tensor:
    """Return a privacy state as a tensor of bytes, equal for equal states."""
    return torch.frombuffer(bytearray(json.dumps(state, sort_keys=True, default=str).encode()), dtype=torch.uint8)


def _mark_of(state: dict[str, Any]) -> Tensor:
    """Return a mark of the ledger in a privacy state, the same on all ranks of a run."""
    content = json.dumps(state["ledger"], sort_keys=True, default=str).encode()
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
