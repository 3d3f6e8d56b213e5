"""Callbacks for private runs; none of them changes ``p.grad``."""

from lightning_dp.callbacks.adaptive_threshold import AdaptiveClipping, AutoThreshold, PublishedAutoThreshold
from lightning_dp.callbacks.clipping_scheduler import ClippingScheduler
from lightning_dp.callbacks.epsilon_monitor import EpsilonMonitor
from lightning_dp.callbacks.fix_module import FixModule
from lightning_dp.callbacks.gradient_diagnostics import GradientDiagnostics
from lightning_dp.callbacks.magnitude_pruning import MagnitudePruning
from lightning_dp.callbacks.noise_scheduler import NoiseScheduler
from lightning_dp.callbacks.privacy_audit import PrivacyAudit
from lightning_dp.callbacks.privacy_budget import PrivacyBudget
from lightning_dp.callbacks.privacy_card import PrivacyCard
from lightning_dp.callbacks.random_sparsification import RandomSparsification
from lightning_dp.callbacks.switch_to_dp import SwitchToDP
from lightning_dp.strategies._lightning import serve_both

__all__ = [
    "AdaptiveClipping",
    "AutoThreshold",
    "ClippingScheduler",
    "EpsilonMonitor",
    "FixModule",
    "GradientDiagnostics",
    "MagnitudePruning",
    "NoiseScheduler",
    "PrivacyAudit",
    "PrivacyBudget",
    "PrivacyCard",
    "PublishedAutoThreshold",
    "RandomSparsification",
    "SwitchToDP",
]

serve_both()  # Trainers of pytorch_lightning accept these callbacks, too
