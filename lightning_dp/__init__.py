"""Differentially private training for any LightningModule.

    trainer = L.Trainer(strategy=DPStrategy(target_epsilon=3.0), callbacks=[EpsilonMonitor()])
    trainer.fit(model, datamodule)

Read ``step/step.py`` first: it is the step, in the order of the data.
"""

from lightning_dp import auditing, schedules
from lightning_dp.accounting import Ledger, PrivacyEvent
from lightning_dp.auditing import AuditResult
from lightning_dp.callbacks import (
    AdaptiveClipping,
    AutoThreshold,
    ClippingScheduler,
    EpsilonMonitor,
    GradientDiagnostics,
    MagnitudePruning,
    NoiseScheduler,
    PrivacyAudit,
    PrivacyBudget,
    PrivacyCard,
    PublishedAutoThreshold,
    RandomSparsification,
    SwitchToDP,
)
from lightning_dp.clipping import (
    AutomaticClipping,
    Clipping,
    FlatClipping,
    NoClipping,
    PerLayerClipping,
    PSACClipping,
    TopAgg,
)
from lightning_dp.errors import PrivacyError
from lightning_dp.fix import Fixed, fix
from lightning_dp.metrics import Epsilon
from lightning_dp.step.plan import DPPlan
from lightning_dp.strategies import DPDDPStrategy, DPStrategy

__version__ = "0.1.0"

__all__ = [
    "AdaptiveClipping",
    "AuditResult",
    "AutoThreshold",
    "AutomaticClipping",
    "Clipping",
    "ClippingScheduler",
    "DPDDPStrategy",
    "DPPlan",
    "DPStrategy",
    "Epsilon",
    "EpsilonMonitor",
    "Fixed",
    "FlatClipping",
    "GradientDiagnostics",
    "Ledger",
    "MagnitudePruning",
    "NoClipping",
    "NoiseScheduler",
    "PSACClipping",
    "PerLayerClipping",
    "PrivacyAudit",
    "PrivacyBudget",
    "PrivacyCard",
    "PrivacyError",
    "PrivacyEvent",
    "PublishedAutoThreshold",
    "RandomSparsification",
    "SwitchToDP",
    "TopAgg",
    "auditing",
    "fix",
    "schedules",
]
