"""Lower confidence bounds on epsilon, which test the epsilon that a run claims.

Read in this order: ``estimates`` (many runs), ``one_run`` (many canaries in one run), ``noise_scale`` (one run,
separate canaries), ``canaries`` and ``records`` (canaries to insert), ``result`` (all bounds together). The callback
``PrivacyAudit`` uses them.
"""

from lightning_dp.auditing.canaries import Canaries, GradientCanaries
from lightning_dp.auditing.estimates import epsilon_clopper_pearson, epsilon_gdp
from lightning_dp.auditing.noise_scale import epsilon_noise_scale
from lightning_dp.auditing.one_run import epsilon_one_run, epsilon_one_run_all_thresholds, epsilon_one_run_gdp
from lightning_dp.auditing.records import mislabelled, random_records
from lightning_dp.auditing.result import AuditResult, audit

__all__ = [
    "AuditResult",
    "Canaries",
    "GradientCanaries",
    "audit",
    "epsilon_clopper_pearson",
    "epsilon_gdp",
    "epsilon_noise_scale",
    "epsilon_one_run",
    "epsilon_one_run_all_thresholds",
    "epsilon_one_run_gdp",
    "mislabelled",
    "random_records",
]
