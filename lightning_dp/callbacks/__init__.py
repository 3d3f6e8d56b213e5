"""Callbacks for private runs: they set public settings or read the ledger, and never touch ``p.grad``."""

from lightning_dp.callbacks.epsilon_monitor import EpsilonMonitor
from lightning_dp.callbacks.privacy_budget import PrivacyBudget

__all__ = ["EpsilonMonitor", "PrivacyBudget"]
