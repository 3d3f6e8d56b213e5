"""Checks of arguments: what an unknown keyword is answered with."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lightning_dp import _validate as check

KNOWN = ("noise_multiplier", "max_grad_norm", "seed")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_grad_nrom": 1.0},
            "Expected arguments of DPStrategy, got max_grad_nrom=1.0. Did you mean max_grad_norm?",
        ),
        (
            {"seed": 1, "noise_multipler": "x", "max_norm": 2},
            "Expected arguments of DPStrategy, got noise_multipler='x', max_norm=2. Did you mean noise_multiplier and "
            "max_grad_norm?",
        ),
        (
            {"zzz": None},
            "Expected arguments of DPStrategy, got zzz=None. There are max_grad_norm, noise_multiplier, seed.",
        ),
    ],
)
def test_an_unknown_keyword_is_named_with_the_nearest(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check.check_keywords(given, KNOWN, owner="DPStrategy")


def test_known_keywords_pass() -> None:
    check.check_keywords({}, KNOWN, owner="DPStrategy")
    check.check_keywords({"seed": 0, "max_grad_norm": 1.0}, KNOWN, owner="DPStrategy")
