"""What survives a process: the ledger in every checkpoint, and files that are whole whenever the process dies."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.reporting.card import RunNotes
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.settings import Settings
from lightning_dp.strategies import checkpoint as saved

#: Ends the name of a checkpoint that is still being written; it never takes part in a resume.
PARTIAL = ".partial"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, forces it to the disk, and then moves it there in one step.

    A resume reads the ledger from the checkpoint: half a file, or the half of a file that was there before, would lose
    what has been spent. Lightning's own writer prepares the file in the temporary directory, and the move from there is a
    copy where that is another file system. Only local paths are handled here; remote stores replace objects as a whole.

    **Guarantee**: after a crash at any moment, the file at ``path`` is the one that was there before or the new one,
    complete. Where the write fails (a full disk, say) the old one stays and what was written beside it is removed.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes the checkpoint; see the class.

        Raises:
            OSError: the file could not be written; what was at ``path`` is untouched.
        """
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(LocalFileSystem._strip_protocol(os.fspath(path)))
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
                f"Expected to write the checkpoint {place.name}, got {error.strerror!r}. What was in its place is untouched: free some "
                "space or choose another dirpath, and resume from the newest checkpoint",
            ) from error


class SavedRun(Strategy):
    """The part of a private run that is saved and read back, as a mixin over a Lightning strategy."""

    settings: Settings
    ledger: Ledger
    _plan: DPPlan | None
    _restored_plan: dict[str, Any] | None = None
    _step: int
    _batch_precision: float
    _unledgered = 0
    _seeded: bool
    _secure: bool
    nonprivate_logs: set[str]
    audits: list[str]
    _decided: tuple[str, ...] = ()

    @property
    def steps_taken(self) -> int:
        """Logical steps of this run that have released noise; schedules are functions of it."""
        return self._step + (self._batch_precision > 0)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's, or one that leaves no half of a file behind."""
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = WholeCheckpointIO()  # it takes none where the user gave it one
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Adds ledger, plan and logical step to the checkpoint; the weights keep the plain module's keys."""
        checkpoint[saved.KEY] = saved.dump(
            self.ledger,
            self._plan,
            self.steps_taken,
            global_step=checkpoint.get("global_step", 0),
            unledgered=self._unledgered,
            notes=self.notes,
        )
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads them back when training resumes; refuses a checkpoint without a ledger."""
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, EOFError, RuntimeError) as error:
            raise PrivacyError(
                f"Expected a whole checkpoint, got {Path(str(checkpoint_path)).name}, which cannot be read: {error}. What its run has "
                "spent is unknown: resume from an intact one."
            ) from error
        module = self.lightning_module
        if module is not None and module.trainer.state.fn == TrainerFn.FITTING:
            self.ledger, self._restored_plan, self._step, self._unledgered = saved.load(
                checkpoint,
                current=self.ledger,
                allow_public=self.settings.allow_public_checkpoint,
                one_step_a_batch=module.automatic_optimization,
            )
            self._batch_precision = 0.0
            if saved.KEY in checkpoint:
                self.take_notes(saved.load_notes(checkpoint))
        return checkpoint

    @property
    def notes(self) -> RunNotes:
        """What the privacy card says beyond plan and ledger; kept in checkpoints."""
        return RunNotes(
            seeded=self._seeded,
            secure_rng=self._secure,
            nonprivate_logs=tuple(sorted(self.nonprivate_logs)),
            mechanisms=self._decided,
            audits=tuple(self.audits),
        )

    def take_notes(self, notes: RunNotes) -> None:
        """Goes on with what steps in the ledger have to say of themselves: of a resumed run, or of another process."""
        self._seeded |= notes.seeded
        self._secure &= notes.secure_rng
        self.nonprivate_logs |= set(notes.nonprivate_logs)
        self.audits = list(dict.fromkeys([*notes.audits, *self.audits]))
        self._decided = notes.mechanisms

    def _note_unledgered(self, global_step: int) -> None:
        """Optimizer steps from before this run: a later checkpoint shows them, and no ledger has to."""
        before = max([global_step, *(saved.most_steps(each.state.values()) for each in self.optimizers)])
        self._unledgered = max(self._unledgered, before - self.ledger.num_steps)
