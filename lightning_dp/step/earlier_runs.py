"""EarlierRuns: the earlier private runs that the ledger of a run counts."""

from __future__ import annotations

from torch import nn

from lightning_dp import _messages
from lightning_dp.accounting import Ledger
from lightning_dp.errors import PrivacyError
from lightning_dp.step.history import joined, uncounted


class EarlierRuns:
    """Earlier private runs on the same data: those that the user named, or else those that trained the module."""

    def __init__(self) -> None:
        self.given: list[Ledger] | None = None
        """Ledgers that the user passed as ``history``; None if there was no such argument."""
        self._known: list[int] = []  # steps of each given ledger that the run's own ledger holds
        self._found = False

    def begin_after(self, ledgers: list[Ledger], own: Ledger) -> Ledger:
        """Return a ledger with the steps of the given ledgers; an empty list says that the runs share no record."""
        self.given, self._known = ledgers, [ledger.num_steps for ledger in ledgers]
        return joined(ledgers, own)

    @property
    def counted(self) -> bool:
        """True if the ledger of the run began with steps of earlier runs."""
        return self._found or bool(self.given)

    def count(self, module: nn.Module, own: Ledger) -> Ledger:
        """Return a ledger with the steps of earlier runs on the parameters of a module, unless ``history`` was given.

        If it was, its runs may have taken steps since.

        Args:
            module: the module to be trained.
            own: the ledger of the run.

        Raises:
            PrivacyError: an earlier run under another relation or unit.
        """
        given, known = self.given or [], self._known
        self._known = [ledger.num_steps for ledger in given]
        if self._known > known:  # steps that were counted before count once only if this run has taken none
            own = joined(given if own.num_steps == sum(known) else [*given, own], own)
        missing = [] if self.given is not None else uncounted(module, own)
        if not missing:
            return own
        ledgers = [ledger for _, ledger in missing]
        _messages.warn(
            f"{missing[0][0]!r} was trained by an earlier private run: its "
            f"{sum(ledger.num_steps for ledger in ledgers)} steps count towards epsilon here, too. If the runs have no "
            "record in common, pass history=[]."
        )
        self._found = True
        return joined([*ledgers, own] if own.num_steps else ledgers, own)

    def check_beginning(self, own: Ledger, found: Ledger) -> None:
        """Check that a checkpoint's ledger begins with the history that was given, as this run's own ledger does.

        Raises:
            PrivacyError: it begins otherwise.
        """
        if self.given and not own.has_same_beginning(found):
            raise PrivacyError(
                "Expected a checkpoint of a run that began with the same history, got one whose ledger begins "
                "otherwise. What the earlier runs spent would be lost: pass the history that its run was given, or "
                "leave history out."
            )

    def check(self, module: nn.Module, own: Ledger) -> None:
        """Check that a ledger counts the earlier runs on the parameters of a module, unless ``history`` was given.

        Raises:
            PrivacyError: it does not count one that ended after the noise was calibrated.
        """
        for name, ledger in [] if self.given is not None else uncounted(module, own):
            raise PrivacyError(
                f"{name!r} was trained by an earlier private run of {ledger.num_steps} steps, which this run does not "
                "count, so epsilon would be understated. Pass history=earlier.ledger or history='its.ckpt' to add it, "
                "or history=[] if the two runs have no record in common."
            )
