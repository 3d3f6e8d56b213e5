"""Privacy accounting: the ledger of releases, their epsilon, and the noise that a budget needs."""

from lightning_dp.accounting.accountants import ACCOUNTANTS, make_accountant
from lightning_dp.accounting.attacks import AttackBounds, attack_bounds
from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.calibration import calibrate_noise_multiplier, first_steps, max_steps_within
from lightning_dp.accounting.events import LedgerEntry, Mechanism, PrivacyEvent
from lightning_dp.accounting.gaussian import GDPAccountant, gaussian_epsilon
from lightning_dp.accounting.ledger import NEIGHBORING_RELATIONS, Ledger
from lightning_dp.accounting.pld import PLDAccountant
from lightning_dp.accounting.prv import PRVAccountant
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.accounting.tcdp import TCDPAccountant, tcdp_epsilon
from lightning_dp.accounting.users import user_epsilon

__all__ = [
    "ACCOUNTANTS",
    "NEIGHBORING_RELATIONS",
    "Accountant",
    "AttackBounds",
    "GDPAccountant",
    "Ledger",
    "LedgerEntry",
    "Mechanism",
    "PLDAccountant",
    "PRVAccountant",
    "PrivacyEvent",
    "RDPAccountant",
    "TCDPAccountant",
    "attack_bounds",
    "calibrate_noise_multiplier",
    "first_steps",
    "gaussian_epsilon",
    "make_accountant",
    "max_steps_within",
    "tcdp_epsilon",
    "user_epsilon",
]
