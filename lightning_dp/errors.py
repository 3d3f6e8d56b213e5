"""The exception classes of this package."""

from __future__ import annotations

import math


class PrivacyError(RuntimeError):
    """An error for a state in which continuing would void the privacy guarantee.

    Wrong arguments raise ``ValueError`` or ``TypeError``; this error is for states that appear only during a run: a
    parameter used where its per-sample gradient cannot be known, a loss that mixes samples, a checkpoint without a
    ledger, a spent budget. Such a state is never repaired silently and never causes only a warning.
    """

    difference = math.inf
    """How much gradients differ, relative to the length of a sample's gradient, if it is raised for that."""


class ComparisonError(PrivacyError):
    """A ``PrivacyError`` for gradients that differ where they are compared: samples may influence each other."""
