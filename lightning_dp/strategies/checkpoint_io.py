"""Checkpoint IO: files stay complete if the process dies at any moment."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from fsspec.core import strip_protocol
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_dp.errors import PrivacyError

#: Suffix of a checkpoint that is still being written; a resume never reads it.
PARTIAL = ".partial"


class WholeCheckpointIO(TorchCheckpointIO):
    """A checkpoint IO that writes to a temporary file next to the target, syncs it to disk, and then renames it.

    A resume reads the ledger from the checkpoint, so an incomplete file would lose the record of the privacy spent.
    Lightning's own writer prepares the file in the temporary directory. If that is on another file system, the final
    move is a copy, which a crash can interrupt. Only local paths are handled here, because remote stores replace
    objects as a whole.

    **Guarantee**: after a crash at any moment, the file at ``path`` is the complete old one or the complete new one. If
    the write fails (a full disk, say), the old file stays and the temporary file is removed.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; a local file at ``path`` is complete at any moment.

        Raises:
            OSError: the file could not be written; the old file at ``path`` is unchanged.
        """
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(strip_protocol(os.fspath(path)))
        partial = place.with_name(place.name + PARTIAL)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"Expected to write the checkpoint {place.name}, got {error.strerror!r}. What was in its place is "
                "untouched: free some space or choose another dirpath, and resume from the newest checkpoint",
            ) from error


@contextmanager
def reading(path: Any) -> Iterator[None]:
    """Add the file's name to the error if a checkpoint cannot be read within the context.

    Raises:
        PrivacyError: the checkpoint is damaged, so the privacy spent by its run is unknown.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, PrivacyError):
        raise
    except (OSError, EOFError, RuntimeError, LookupError, UnpicklingError) as error:
        if "an allowed global" in str(error):  # the file is whole: torch says how to allow its classes
            raise
        raise PrivacyError(
            f"Expected a whole checkpoint, got {Path(str(path)).name}, which cannot be read: {error!r}. What its run "
            "has spent is unknown: resume from an intact one."
        ) from error
