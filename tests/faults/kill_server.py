"""Run by test_kills.py: trains until it is killed, again and again, each time from the checkpoint that the last death
left.

torch and Lightning are imported once. Each life is a fork of this process, made while it has a single thread; it dies
by its own hand at a random one of the places below, or by its parent's at a random time. What it does to the weights
goes into a journal that outlives it: one line ``before after`` (digests) for each step of the optimizer. How many
releases made some weights can then be read off the journal, whatever any ledger says.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dp import DPDDPStrategy, DPStrategy
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.noising import ReleaseNoise
from lightning_dp.step.reduction import AllReduce
from lightning_dp.step.state import PrivacyState
from lightning_dp.step.step import PrivateStep
from lightning_dp.strategies.checkpoint_io import PARTIAL
from tests.helpers import Classifier, make_loader, make_trainer

OUT, KILLS, SEED = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
CHECKPOINT, JOURNAL = OUT / "last.ckpt", OUT / "journal"
#: by its own hand: within the forward, before the clipped sum, after the ledger's entry, with the noise on, within the
#: all-reduce, before the step, in the middle of a checkpoint's file, before and after it is moved; or by the parent
PLACES = ["forward", "clip", "ledger", "noise", "all-reduce", "step", "write", "sync", "move", "moved", "parent"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def digest(parameters: Any) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parameters)).hexdigest()[:16]


class Journalled(torch.optim.SGD):
    """Writes down each change of the weights before anything else can happen to them."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = closure() if closure is not None else None
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = digest(parameters)
        countdown("step")
        super().step()
        descriptor = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{before} {digest(parameters)}\n".encode())
        os.close(descriptor)
        return loss


class Victim(Classifier):
    def __init__(self) -> None:
        super().__init__(optimizer=Journalled, lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        countdown("forward")
        return super().training_step(batch, batch_idx)


fate: dict[str, Any] = {"place": "", "left": 0}


def countdown(place: str) -> None:
    """Dies at the chosen place, the chosen time around."""
    if place == fate["place"]:
        fate["left"] -= 1
        if fate["left"] < 0:
            die()


def before(owner: Any, name: str, place: str) -> None:
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        countdown(place)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def after(owner: Any, name: str, place: str) -> None:
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        countdown(place)
        return result

    setattr(owner, name, dying)


def half_written(self: Path, *args: Any, **kwargs: Any) -> Any:
    file = opened(self, *args, **kwargs)
    if self.name.endswith(PARTIAL) and fate["place"] == "write":
        write = file.write

        class Half:
            """A file whose write stops in the middle."""

            def __enter__(self) -> Half:
                return self

            def __exit__(self, *error: Any) -> None:
                file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, content: Any) -> int:
                fate["left"] -= 1
                if fate["left"] < 0:
                    write(content[: len(content) // 2])
                    file.flush()
                    die()
                return write(content)

        return Half()
    return file


opened = Path.open


def all_reduce_halfway(self: AllReduce, accumulator: Accumulator) -> None:
    """A collective that has begun, on a group of one."""
    work = dist.all_reduce(accumulator.flat, async_op=True)
    countdown("all-reduce")
    work.wait()


def live() -> None:
    """One life: resume, train, save after every second step, until death."""
    strategy: Any = DPDDPStrategy if fate["place"] == "all-reduce" else DPStrategy
    strategy = strategy(noise_multiplier=1.3, target_delta=1e-5, check_per_sample=False, microbatch_size=8)
    if fate["place"] == "all-reduce":
        AllReduce.reduce = all_reduce_halfway  # type: ignore[method-assign]
    before(PrivateStep, "collect", "clip")
    after(PrivacyState, "record", "ledger")
    after(ReleaseNoise, "add", "noise")
    before(os, "fsync", "sync")
    before(Path, "replace", "move")
    after(Path, "replace", "moved")
    Path.open = half_written  # type: ignore[method-assign]
    saving = ModelCheckpoint(dirpath=OUT, filename="last", every_n_train_steps=2, enable_version_counter=False)
    trainer = make_trainer(strategy, OUT, callbacks=[saving], enable_checkpointing=True, max_epochs=10_000)
    resume = CHECKPOINT if CHECKPOINT.exists() else None
    trainer.fit(Victim(), make_loader(), ckpt_path=resume, weights_only=True if resume else None)


def releases_in(weights: str) -> int:
    """How many steps of the optimizer made these weights, along the journal."""
    made: dict[str, str] = (
        dict(reversed(line.split()) for line in JOURNAL.read_text().splitlines()) if JOURNAL.exists() else {}
    )
    count = 0
    while weights in made:
        weights, count = made[weights], count + 1
    return count


def post_mortem(place: str, code: int) -> dict[str, Any]:
    """What the dead process left: read as anybody would, and counted by the journal."""
    left: dict[str, Any] = {"place": place, "signal": os.WTERMSIG(code) if os.WIFSIGNALED(code) else None}
    left["files"] = sorted(path.name for path in OUT.glob("*.ckpt*"))
    if not CHECKPOINT.exists():
        return {**left, "truth": 0, "ledger": None}
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    own = checkpoint["lightning_dp"]
    tensors = [name for state in checkpoint["optimizer_states"] for name in state["state"]]
    return {
        **left,
        "truth": releases_in(digest(checkpoint["state_dict"].values())),
        "ledger": own["ledger"]["num_steps"],
        "entries": own["ledger"]["entries"],
        "lineage": own["ledger"]["lineage"],
        "global_step": checkpoint["global_step"],
        "optimizer_tensors": tensors,
        "keys": sorted(checkpoint["state_dict"]),
    }


def main() -> None:
    chance = random.Random(SEED)
    order = [PLACES[number % len(PLACES)] for number in range(KILLS)]
    chance.shuffle(order)
    with (OUT / "deaths.jsonl").open("w") as report:
        for place in order:
            fate.update(place=place, left=chance.randrange(0, 7))
            delay = chance.uniform(0.05, 0.8)
            child = os.fork()
            if child == 0:
                try:
                    live()
                finally:
                    os._exit(3)
            if place == "parent":
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
            code = os.waitpid(child, 0)[1]
            report.write(json.dumps(post_mortem(place, code)) + "\n")
            report.flush()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    main()
