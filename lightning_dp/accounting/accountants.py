"""The accountants by name."""

from __future__ import annotations

from lightning_dp.accounting.base import Accountant
from lightning_dp.accounting.gaussian import GDPAccountant
from lightning_dp.accounting.pld import PLDAccountant
from lightning_dp.accounting.prv import PRVAccountant
from lightning_dp.accounting.rdp import RDPAccountant
from lightning_dp.accounting.tcdp import TCDPAccountant

ACCOUNTANTS: dict[str, type[Accountant]] = {
    accountant.name: accountant
    for accountant in (PLDAccountant, RDPAccountant, PRVAccountant, GDPAccountant, TCDPAccountant)
}


def make_accountant(name: str) -> Accountant:
    """Return a new accountant of a given name.

    **Guarantee**: every call returns a new instance.

    Args:
        name: "pld" (tight), "rdp" (cheap), "prv" (opacus' numerical bound), "gdp" (exact, nothing subsampled) or
            "tcdp" (a loose closed form, to cross-check with). Only "pld" and "rdp" amplify random allocation; the
            others count such a pass as one Gaussian, an upper bound.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> make_accountant("pld").name
        'pld'
    """
    if not isinstance(name, str) or name not in ACCOUNTANTS:
        raise ValueError(
            f"Expected accountant in {tuple(ACCOUNTANTS)}, got accountant={name!r}. Pass one of these names."
        )
    return ACCOUNTANTS[name]()
