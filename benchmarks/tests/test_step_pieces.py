"""The benchmark of the tuning's pieces: each can be switched off, and has figures of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import step_pieces
from benchmarks.step_pieces import PIECES, main, switch_off


@pytest.mark.parametrize("piece", PIECES)
def test_piece_is_switched_off(piece: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, instead = PIECES[piece]
    owner = importlib.import_module(module)
    monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    switch_off(piece)
    assert getattr(owner, name) is instead


def test_piece_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECES, "owners", ("lightning_dp.step.accumulator", "has_moved", lambda: None))
    with pytest.raises(AttributeError, match=r"Expected lightning_dp.step.accumulator.has_moved, got a module without"):
        switch_off("owners")


@pytest.mark.slow
def test_each_piece_has_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_pieces, "idle_pieces", lambda: {"prefetch"})
    out = tmp_path / "pieces.json"
    chosen = ["--cases", "mlp", "--pieces", "owners", "prefetch", "--pairs", "1", "--seconds", "0.01"]
    main([*chosen, "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())["mlp"]
    assert found["prefetch"] == "idle"
    assert found["owners"]["pairs"] == 1
    assert found["owners"]["min"] == found["owners"]["max"] > 0
