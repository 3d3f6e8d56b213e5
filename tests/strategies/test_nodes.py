"""Two nodes of one process each, started by torchrun: one run, as two processes of one node are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("nodes_run.py")


@pytest.mark.slow
def test_two_launchers_make_one_run(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *(
                    f"--node-rank={node}",
                    "--master-addr=127.0.0.1",
                    f"--master-port={port}",
                    str(SCRIPT),
                    str(tmp_path),
                ),
            ],
            env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    errors = [launcher.communicate(timeout=280)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    for kind in ("DPDDPStrategy", "DPFSDPStrategy"):
        first, second = (seen[kind] for seen in ranks)
        assert (first["ranks"], second["ranks"]) == ((0, 0, 0, 2), (1, 0, 1, 2))
        assert torch.equal(first["weights"], second["weights"])
        assert first["events"] == second["events"] == [(16 / 64, 4)]
        assert first["size"] == second["size"] > 0
