"""Scripts in processes of their own: forks of one that has imported everything and computed nothing yet.

Importing torch and Lightning takes 5 s of processor time, more than most scripts need for themselves. ``conftest.py``
forks the server when all tests are collected; a backward before that would forbid one in every fork.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.draws import repeat_draws

TIMEOUT = 280.0
_server: list[socket.socket] = []


def run_script(script: Path, *arguments: object, folder: Path, ranks: int = 1, **environment: str) -> str:
    """Run a script to its end, on one or several ranks, and return what the first one printed.

    Args as those of :func:`ends_of_script`.
    """
    codes = ends_of_script(script, *arguments, folder=folder, ranks=ranks, **environment)
    files = [folder / f"{script.stem}{rank}.err" for rank in range(ranks)]
    errors = [f"{code}: {file.read_text()[-3000:]}" for code, file in zip(codes, files, strict=True)]
    assert not any(codes), "\n".join(errors)
    return (folder / f"{script.stem}0.out").read_text()


def ends_of_script(script: Path, *arguments: object, folder: Path, ranks: int = 1, **environment: str) -> list[int]:
    """Run a script to its end, on one or several ranks, each in a session of its own, and return the exit code of each.

    Args:
        script: file.
        arguments: of its command line.
        folder: takes its output.
        ranks: processes of one group; above 1 each finds its rank in the environment, as torchrun sets it.
        environment: added to that of the tests.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    jobs = [
        {
            "command": [str(script), *map(str, arguments)],
            "environment": {
                **os.environ,
                **environment,
                **({**group, "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            },
            "out": str(folder / f"{script.stem}{rank}.out"),
            "err": str(folder / f"{script.stem}{rank}.err"),
        }
        for rank in range(ranks)
    ]
    return _ask(jobs) if _server else _start(jobs)


def run_two_ranks(
    script: Path, temporary: pytest.TempPathFactory, *parts: str, weights_only: bool = False
) -> list[dict[str, Any]]:
    """Run a script in two gloo processes; return what each rank wrote to ``rank0.pt`` and ``rank1.pt``.

    Several test processes share one run: see :func:`run_once`.

    Args:
        script: takes the folder, and the parts.
        temporary: pytest's folders.
        parts: of the script that run; default: all.
        weights_only: whether the ranks wrote tensors alone.
    """
    out = run_once(
        "-".join([*script.relative_to(Path(__file__).parent).with_suffix("").parts, *parts]),
        temporary,
        lambda folder: run_script(script, folder, *parts, folder=folder, ranks=2),
    )
    return [torch.load(out / f"rank{rank}.pt", weights_only=weights_only) for rank in (0, 1)]


def run_once(name: str, temporary: pytest.TempPathFactory, run: Callable[[Path], object]) -> Path:
    """Return the folder of a run that all test processes share: the first that asks for it starts it, the others wait
    for its end.

    Args:
        name: of the folder.
        temporary: pytest's folders.
        run: writes its results into the folder.
    """
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    out = (temporary.getbasetemp().parent if parallel else temporary.getbasetemp()) / name
    done = out.with_suffix(".done")
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            out.mkdir()
            run(out)
            done.touch()
    return out


def start_server() -> None:
    """Fork the process that scripts are forked from, on systems where a fork may use torch."""
    if _server or sys.platform != "linux":
        return
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of threads; ours only reads
        child = os.fork()
    if child == 0:
        try:
            ours.close()
            _serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    _server.append(ours)
    atexit.register(ours.close)


def _ask(jobs: list[dict[str, Any]]) -> list[int]:
    connection = _server[0]
    connection.sendall(json.dumps(jobs).encode() + b"\n")
    with connection.makefile("r") as answers:
        pids = json.loads(answers.readline())
        try:
            connection.settimeout(TIMEOUT)
            return list(json.loads(answers.readline()))
        except BaseException:
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
            raise
        finally:
            connection.settimeout(None)


def _start(jobs: list[dict[str, Any]]) -> list[int]:
    """Start interpreters, where there is no server."""
    started = []
    for job in jobs:
        with open(job["out"], "w") as out, open(job["err"], "w") as err:
            command = [sys.executable, "-W", "ignore", *job["command"]]
            started.append(
                subprocess.Popen(command, env=job["environment"], stdout=out, stderr=err, start_new_session=True)
            )
    return [each.wait(TIMEOUT) for each in started]


def _serve(connection: socket.socket) -> None:
    for line in connection.makefile("r"):
        pids = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                connection.close()
                os._exit(_live(job))
            pids.append(child)
        connection.sendall(json.dumps(pids).encode() + b"\n")
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        connection.sendall(json.dumps(codes).encode() + b"\n")


def _live(job: dict[str, Any]) -> int:
    """Run a script as a new interpreter would; return its exit code."""
    os.setsid()
    for number, path, held in ((1, job["out"], sys.stdout), (2, job["err"], sys.stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for each in {number, held.fileno()}:  # pytest's own file, which handlers of logs hold
            os.dup2(opened, each)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(job["environment"])
    warnings.simplefilter("ignore")
    script, *_ = sys.argv = job["command"]
    repeat_draws(f"{Path(script).name} {os.environ.get('LOCAL_RANK', 0)}")
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
