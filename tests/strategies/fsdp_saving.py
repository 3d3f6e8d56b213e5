"""Cases of fsdp_run.py that save a sharded run, in parts or as a whole, and resume it."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_dp import (
    DPStrategy,
)
from tests.helpers import make_dataset
from tests.strategies.fsdp_fits import OUT, RANK, fit, private, said, whole
from tests.strategies.sharded import Sharded, plain


def adam() -> Sharded:
    return Sharded(plain(), optimizer=torch.optim.Adam, lr=0.05)


def saving() -> dict[str, Any]:
    """Two epochs, saved in parts and as a whole, resumed from both; and a folder whose files are of two checkpoints."""
    loader = DataLoader(make_dataset(), batch_size=8)
    module, full = adam(), private(save_distributed_checkpoint=False)
    trainer = fit(module, loader, max_epochs=2)
    trainer.save_checkpoint(OUT / "parts.ckpt")
    fit(adam(), loader, strategy=full, resume=OUT / "parts.ckpt", max_epochs=2).save_checkpoint(OUT / "full.ckpt")
    resumed = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=3)
    resumed.save_checkpoint(OUT / "later.ckpt")
    resumed.save_checkpoint(OUT / "later.ckpt")  # replaces what is there
    if RANK == 0:
        shutil.copytree(OUT / "parts.ckpt", OUT / "mixed.ckpt")
        shutil.copy(OUT / "later.ckpt" / "meta.pt", OUT / "mixed.ckpt" / "meta.pt")
        shutil.copytree(OUT / "later.ckpt", OUT / "parts of two.ckpt")
        shutil.copy(OUT / "parts.ckpt" / "__1_0.distcp", OUT / "parts of two.ckpt" / "__1_0.distcp")
        os.rename(OUT / "parts.ckpt", OUT / "parts.ckpt.old")  # as a death in the middle of a move leaves it
    dist.barrier()
    recovered = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=2)
    return {
        "weights": whole(dict(module.named_parameters())),
        "recovered": whole(dict(recovered.lightning_module.named_parameters())),
        "steps": [each.strategy.ledger.num_steps for each in (trainer, resumed, recovered)],
        "lineages": {each.strategy.ledger.lineage for each in (trainer, resumed, recovered)},
        "from full": fit(adam(), loader, resume=OUT / "full.ckpt", max_epochs=3).strategy.ledger.num_steps,
        "mixed": said(lambda: fit(adam(), loader, resume=OUT / "mixed.ckpt", max_epochs=3)),
        "parts of two": said(lambda: fit(adam(), loader, resume=OUT / "parts of two.ckpt", max_epochs=3)),
        "stateless": stateless(loader),
        "copied": copied(module),
    }


def stateless(loader: Any) -> dict[str, Any]:
    """SGD without momentum, saved as a whole after an epoch and resumed by a module that asks for another rate."""
    first = fit(Sharded(plain(), lr=0.05), loader, strategy=private(save_distributed_checkpoint=False), max_epochs=1)
    first.save_checkpoint(OUT / "sgd.ckpt")
    saved = whole(dict(first.lightning_module.named_parameters()))
    still = fit(Sharded(plain(), lr=0.9), loader, resume=OUT / "sgd.ckpt", max_epochs=1)
    onward = fit(Sharded(plain(), lr=0.9), loader, resume=OUT / "sgd.ckpt", max_epochs=2)
    return {
        "same": all(
            torch.equal(saved[n], w) for n, w in whole(dict(still.lightning_module.named_parameters())).items()
        ),
        "rate": onward.optimizers[0].param_groups[0]["lr"],
        "steps": onward.strategy.ledger.num_steps,
    }


def copied(module: Sharded) -> str:
    """What a run of one process says of a whole copy of weights that were sharded when they were trained."""
    copy = Sharded(plain())
    copy.load_state_dict(whole(module.state_dict()))
    return said(lambda: DPStrategy(noise_multiplier=1.0).state.check_history(copy))


def resumed_alone() -> dict[str, Any]:
    """One process goes on with a checkpoint of two: first no step, then an epoch."""
    loader = DataLoader(make_dataset(), batch_size=16)
    still = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=2)
    weights = whole(dict(still.lightning_module.named_parameters()))
    onward = fit(adam(), loader, resume=OUT / "parts.ckpt", max_epochs=3)
    strategy = private(noise_multiplier=None, target_epsilon=3.0)
    target = fit(
        Sharded(plain()), DataLoader(make_dataset(), batch_size=8), (), strategy, OUT / "target.ckpt", max_epochs=2
    )
    return {
        "weights": weights,
        "steps": onward.strategy.ledger.num_steps,
        "world_size": onward.world_size,
        "target": (target.strategy.epsilon(), [entry.num_steps for entry in target.strategy.ledger.entries]),
    }
