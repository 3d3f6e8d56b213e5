"""Run by test_sharded_kills.py: saves a sharded checkpoint and dies by its own hand, once at every operation on files.

torch is imported once; each life is a fork. What a life leaves is read as a resume would read it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_dp.strategies import sharded_files

OUT = Path(sys.argv[1])
FOLDER = OUT / "run.ckpt"
#: Audited operations of the interpreter at which a life may end: opening, moving and removing files and folders.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def save(steps: int) -> None:
    checkpoint = {
        "state_dict": {"weight": torch.full((8,), float(steps))},
        "optimizer_states": [{"momentum": torch.full((8,), float(steps))}],
        "global_step": steps,
        "lightning_dp": {"ledger": {"num_steps": steps}, "global_step": steps},
    }
    sharded_files.save(checkpoint, FOLDER, rank=0, barrier=lambda: None)


def read() -> dict[str, Any]:
    sharded_files.recover(FOLDER)
    rest = torch.load(FOLDER / "meta.pt", weights_only=True)
    sharded_files.check(rest, FOLDER)
    held = {"state_dict": {"weight": torch.zeros(8)}, "optimizer_0": {"momentum": torch.zeros(8)}}
    load(held, checkpoint_id=FOLDER)
    found = {float(x) for part in held.values() for tensor in part.values() for x in tensor}
    return {"steps": rest["lightning_dp"]["ledger"]["num_steps"], "found": sorted(found)}


def live(place: int, steps: int) -> None:
    left = [place]

    def watch(event: str, args: Any) -> None:
        if event in EVENTS and any(str(FOLDER.name) in str(arg) for arg in args):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(steps)


def main() -> None:
    save(1)
    steps, place, ended = 1, 0, False
    with (OUT / "deaths.jsonl").open("w") as report:
        while not ended:
            child = os.fork()
            if child == 0:
                try:
                    live(place, steps + 1)
                    os._exit(0)
                finally:
                    os._exit(3)
            code = os.waitpid(child, 0)[1]
            ended = not os.WIFSIGNALED(code)
            before = sorted(path.name for path in OUT.glob("run.ckpt*"))
            found = read()
            report.write(json.dumps({"place": place, "code": code, "before": steps, "left": before, **found}) + "\n")
            steps, place = int(found["steps"]), place + 1
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
