"""The only exception class of this package."""

from __future__ import annotations


class PrivacyError(RuntimeError):
    """An error for states in which continuing would void the privacy guarantee.

    Wrong arguments raise ``ValueError`` or ``TypeError``; this error is for what is only seen while training runs:
    a parameter used where its per-sample gradient cannot be known, a loss that mixes samples, a checkpoint without a
    ledger, a spent budget. It is never repaired silently and never only a warning.
    """
