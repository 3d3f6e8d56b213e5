"""Differentially private training for any LightningModule.

    trainer = L.Trainer(strategy=DPStrategy(target_epsilon=3.0), callbacks=[EpsilonMonitor()])
    trainer.fit(model, datamodule)

Names and submodules are imported on first use, so a program that uses only the core never imports lightning. Read
``step/step.py`` first: it holds the private step, in the order of the data.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_dp.fix import Fixed, fix  # at once: the import of the file `fix` would hide the function `fix`

__version__ = "0.2.0"

__all__ = [
    "AdaptiveClipping",
    "AuditResult",
    "AutoThreshold",
    "AutomaticClipping",
    "Clipping",
    "ClippingScheduler",
    "CorrelatedNoise",
    "DPDDPStrategy",
    "DPFSDPStrategy",
    "DPPlan",
    "DPStrategy",
    "Epsilon",
    "EpsilonMonitor",
    "FabricPrivacy",
    "FixModule",
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
    "PrivateLoop",
    "PrivateTrainerMixin",
    "PublishedAutoThreshold",
    "RandomSparsification",
    "SwitchToDP",
    "TopAgg",
    "auditing",
    "fix",
    "make_private",
    "schedules",
]

if TYPE_CHECKING:
    from lightning_dp import auditing, schedules
    from lightning_dp.accounting import Ledger, PrivacyEvent
    from lightning_dp.auditing import AuditResult
    from lightning_dp.callbacks import (
        AdaptiveClipping,
        AutoThreshold,
        ClippingScheduler,
        EpsilonMonitor,
        FixModule,
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
    from lightning_dp.fabric import FabricPrivacy
    from lightning_dp.hf import PrivateTrainerMixin
    from lightning_dp.loop import PrivateLoop, make_private
    from lightning_dp.metrics import Epsilon
    from lightning_dp.noise import CorrelatedNoise
    from lightning_dp.step.plan import DPPlan
    from lightning_dp.strategies import DPDDPStrategy, DPFSDPStrategy, DPStrategy
else:
    _SUBMODULES = (
        "accounting", "auditing", "callbacks", "clipping", "datalens", "fabric", "hf", "loop", "masks", "metrics",
        "noise", "per_sample", "reporting", "sampling", "sandbox", "schedules", "step", "strategies", "system",
        "trials",
    )  # fmt: skip
    _NAMES_BY_SOURCE = {
        "accounting": "Ledger PrivacyEvent",
        "auditing": "AuditResult",
        "callbacks": (
            "AdaptiveClipping AutoThreshold ClippingScheduler EpsilonMonitor FixModule GradientDiagnostics "
            "MagnitudePruning NoiseScheduler PrivacyAudit PrivacyBudget PrivacyCard PublishedAutoThreshold "
            "RandomSparsification SwitchToDP"
        ),
        "clipping": "AutomaticClipping Clipping FlatClipping NoClipping PSACClipping PerLayerClipping TopAgg",
        "errors": "PrivacyError",
        "fabric": "FabricPrivacy",
        "hf": "PrivateTrainerMixin",
        "loop": "PrivateLoop make_private",
        "metrics": "Epsilon",
        "noise": "CorrelatedNoise",
        "step.plan": "DPPlan",
        "strategies": "DPDDPStrategy DPFSDPStrategy DPStrategy",
    }
    _SOURCES = {name: source for source, names in _NAMES_BY_SOURCE.items() for name in names.split()}

    def __getattr__(name):
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        if name not in _SOURCES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_SOURCES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *_SUBMODULES, *__all__})
