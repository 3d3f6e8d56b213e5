"""A run in a process of its own, which imports neither lightning nor the tests."""

from __future__ import annotations

from lightning_dp import Epsilon, Ledger, PrivacyEvent


class Run:
    """A strategy as far as the metric sees it: its ledger is exchanged when a run resumes."""

    def __init__(self) -> None:
        self.ledger = Ledger()


def follow(run: Run, metric: Epsilon) -> None:
    """Record a release in the ledger that came along, and end with 17 if the metric follows it."""
    run.ledger.record(PrivacyEvent(kind="gaussian", noise_multiplier=1.0))
    raise SystemExit(17 if 4 < float(metric.compute()) < 5 else 1)
