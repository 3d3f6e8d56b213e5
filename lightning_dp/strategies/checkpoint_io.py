"""Checkpoint IO: files stay complete if the process dies at any moment."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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

    A resume reads the ledger from the checkpoint: half a file, or the half of a file that was there before, would lose
    what has been spent. Lightning's own writer prepares the file in the temporary directory, and the move from there is
    a copy where that is another file system. Only local paths are handled here; remote stores replace objects as a
    whole.

    **Guarantee**: after a crash at any moment, the file at ``path`` is the one that was there before or the new one,
    complete. Where the write fails (a full disk, say) the old one stays and what was written next to it is removed.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint; see the class.

        Raises:
            OSError: the file could not be written; what was at ``path`` is untouched.
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
    """Name the file in the error if a checkpoint cannot be read.

    Raises:
        PrivacyError: it is damaged, so what its run has spent is unknown.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, PrivacyError):
        raise
    except (OSError, EOFError, RuntimeError) as error:
        raise PrivacyError(
            f"Expected a whole checkpoint, got {Path(str(path)).name}, which cannot be read: {error}. What its run has "
            "spent is unknown: resume from an intact one."
        ) from error
