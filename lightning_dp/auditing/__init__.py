"""Lower confidence bounds on epsilon: do they contradict the epsilon that is claimed?

Read in this order: ``estimates`` (many runs), ``one_run`` (many canaries in one run), ``noise_scale`` (one run,
canaries apart), ``canaries`` and ``records`` (what is put in), ``result`` (all of it together). ``PrivacyAudit`` puts
them to work.
"""

from lightning_dp.auditing.canaries import Canaries, GradientCanaries
from lightning_dp.auditing.estimates import epsilon_clopper_pearson, epsilon_gdp
from lightning_dp.auditing.noise_scale import epsilon_noise_scale
from lightning_dp.auditing.one_run import (
    epsilon_one_run,
    epsilon_one_run_all_thresholds,
    epsilon_one_run_gdp,
)
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
