"""RunNotes: facts of a run for its statement and card, in addition to plan and ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunNotes:
    """Facts of a run for its statement and card, in addition to plan and ledger.

    Args:
        seeded: whether sampling and noise came from a seed, which voids the guarantee against those who know it.
        secure_rng: whether the noise came from the generator that withstands floating-point attacks.
        nonprivate_logs: names of quantities that were logged from training data without noise.
        mechanisms: settings that callbacks controlled, one entry each.
        audits: results of audits of the run, one line each.
        choices: decisions during training from quantities without noise, such as a learning rate, one entry each.
        kept_apart: reasons to treat samples as independent of each other, one entry each.
    """

    seeded: bool = False
    secure_rng: bool = False
    nonprivate_logs: tuple[str, ...] = ()
    mechanisms: tuple[str, ...] = ()
    audits: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kept_apart: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Return the notes as plain values, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunNotes:
        """Return the notes in a checkpoint; a missing note is empty or False.

        Raises:
            ValueError: a field of another type.
        """
        found: dict[str, Any] = {}
        for each in fields(cls):
            value = state.get(each.name, each.default)
            names = [value] if each.default is False else value
            kind = bool if each.default is False else str
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, kind) for name in names):
                raise ValueError(
                    f"Expected flags and lists of names as notes of a run, got {dict(state)!r}. Use an intact "
                    "checkpoint."
                )
            found[each.name] = value if kind is bool else tuple(value)
        return cls(**found)
