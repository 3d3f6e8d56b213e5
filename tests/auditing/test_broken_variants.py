"""The table of broken builds: each is caught, and what catches it lets the sound build pass.

``docs/auditing.md`` shows the table. ``noise_once_a_rank`` is a build whose ranks each draw the whole noise instead of
their share: in ``GaussianNoise`` that is sqrt(2) of the share of two.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.auditing.broken import CHECKS, VARIANTS, Check

TABLE = Path(__file__).parents[2] / "docs" / "auditing.md"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.one_in(2)
def test_broken_variant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    variant.breaks(monkeypatch)
    with pytest.raises(AssertionError, match=variant.says):
        variant.check(tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.one_in(4)
def test_sound_build_passes(check: Check, tmp_path: Path) -> None:
    """False-alarm rates are in the checks: 1.3e-5 over all of them."""
    check(tmp_path)


def test_the_published_table_is_this_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)` \|$", TABLE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, variant.check.__name__) for name, variant in VARIANTS.items()]
