"""kill -9 at every operation on files of a sharded checkpoint: the old folder or the new one is there, complete
(I7).
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

from lightning_dp.strategies import sharded_files
from tests.processes import run_script

SCRIPT = Path(__file__).with_name("sharded_kills_run.py")


def test_first_save_is_whole_once_all_is_written(tmp_path: Path) -> None:
    """A death before the only rename leaves a complete folder under another name, and none before."""
    complete, half = tmp_path / "run.ckpt.partial", tmp_path / "other.ckpt.partial"
    for folder in (complete, half):
        folder.mkdir()
    (complete / sharded_files.META).write_bytes(b"last")
    for name in ("run.ckpt", "other.ckpt"):
        sharded_files.recover(tmp_path / name)
    assert (tmp_path / "run.ckpt" / sharded_files.META).exists()
    assert not (tmp_path / "other.ckpt").exists()


def test_no_death_leaves_half_a_folder(tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, folder=tmp_path)
    deaths = [json.loads(line) for line in (tmp_path / "deaths.jsonl").read_text().splitlines()]
    assert len(deaths) > 10
    for death in deaths[:-1]:
        assert death["code"] == signal.SIGKILL, death
        assert death["steps"] in (death["before"], death["before"] + 1), death
        assert death["found"] == [death["steps"]], death  # weights, optimizer and ledger are of one moment
    assert deaths[-1]["code"] == 0
    assert any("run.ckpt" not in death["left"] for death in deaths)  # one of them was between the two moves
    assert any(death["steps"] > death["before"] for death in deaths[:-1])
