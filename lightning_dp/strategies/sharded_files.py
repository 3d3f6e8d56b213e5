"""Sharded checkpoints: folders that stay complete if a process dies at any moment, with the ledger next to the
weights.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from lightning_dp.errors import PrivacyError
from lightning_dp.step import checkpoint as saved
from lightning_dp.strategies.checkpoint_io import PARTIAL

#: Suffix of the folder that is being replaced; it is restored if a crash left no folder in its place.
OLD = ".old"
#: File of a folder that holds everything but tensors; it is written last.
META = "meta.pt"


def save(checkpoint: dict[str, Any], path: Path, *, is_first: bool, barrier: Callable[[], None]) -> None:
    """Write a checkpoint to a folder, on every rank.

    Each rank writes its part of the weights into a new folder next to the old one. The first rank then writes
    everything else, and moves the new folder into the place of the old one. The privacy state is written twice: with
    the weights, and with everything else.

    **Guarantee**: if any process dies at any moment while an old folder exists, :func:`recover` leaves the complete old
    or the complete new folder at ``path``.

    Args:
        checkpoint: Lightning's checkpoint with the privacy state; its tensors are removed.
        path: path of the folder.
        is_first: whether this is the first rank.
        barrier: returns once all ranks have called it.
    """
    partial = _beside(path, PARTIAL)
    if is_first:
        recover(path)
        _remove(partial)
        partial.mkdir(parents=True)
    barrier()
    state = {"state_dict": checkpoint.pop("state_dict"), saved.KEY: _bytes_of(checkpoint[saved.KEY])}
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
    """Check that the weights and the ledger of a folder were written together; every rank calls it.

    Raises:
        PrivacyError: the ledger in ``checkpoint`` is not the ledger that was written with the weights.
    """
    found = FileSystemReader(path).read_metadata().state_dict_metadata.get(saved.KEY)
    if found is None and saved.KEY not in checkpoint:
        return  # not from a private strategy: another check handles this
    held = {saved.KEY: torch.empty(getattr(found, "size", 0), dtype=torch.uint8)}
    if found is not None:
        load(held, checkpoint_id=path)
    if saved.KEY not in checkpoint or not torch.equal(held[saved.KEY], _bytes_of(checkpoint[saved.KEY])):
        raise PrivacyError(
            f"Expected the ledger that was written with the weights of {path.name}, got another one in {META}. Files "
            "of two checkpoints were mixed, so what the weights have spent is unknown: use an intact checkpoint."
        )


def _bytes_of(state: dict[str, Any]) -> Tensor:
    """Return a privacy state as a tensor of bytes, equal for equal states."""
    return torch.frombuffer(bytearray(json.dumps(state, sort_keys=True, default=str).encode()), dtype=torch.uint8)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
