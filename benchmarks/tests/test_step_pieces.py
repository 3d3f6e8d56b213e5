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
    monkeypatch.setitem(PIECES, "threads", ("lightning_dp.noise.cpu", "has_moved", lambda: None))
    with pytest.raises(AttributeError, match=r"Expected lightning_dp.noise.cpu.has_moved, got a module without"):
        switch_off("threads")


@pytest.mark.slow
def test_each_piece_has_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_pieces, "idle_pieces", lambda: {"generator"})
    out = tmp_path / "pieces.json"
    chosen = ["--cases", "mlp", "--pieces", "allocator", "generator", "--pairs", "1", "--seconds", "0.01"]
    main([*chosen, "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())["mlp"]
    assert found["generator"] == "idle"
    assert found["allocator"]["pairs"] == 1
    assert found["allocator"]["min"] == found["allocator"]["max"] > 0
