"""Run by test_ddp.py in two processes: each case trains, and each rank writes down what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp import EpsilonMonitor
from lightning_dp.datalens import DataLens
from tests.datalens.helpers import make_model, make_records

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])


class Watching(DataLens):
    """Keeps every noisy sum and the number of its teachers."""

    def _noisy_votes(self, samples: Tensor, labels: Tensor) -> Tensor:
        noisy = super()._noisy_votes(samples, labels)
        self.__dict__.setdefault("seen", []).append(noisy.clone())
        self.__dict__["num_own"] = len(self._teachers)
        return noisy


def fit(resume: Any = None, max_epochs: int = 1, **options: Any) -> tuple[L.Trainer, Watching]:
    model = make_model(num_teachers=5, **options)
    model.__class__ = Watching
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpsilonMonitor()],
        default_root_dir=OUT,
        max_epochs=max_epochs,
    )
    loader = DataLoader(make_records(), batch_size=5, shuffle=True)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=True if resume else None)
    return trainer, model  # type: ignore[return-value]


def main() -> None:
    seen: dict[str, Any] = {}
    _, model = fit(sigma=0.0)
    seen["votes"], seen["num_own"] = torch.stack(model.__dict__["seen"]), model.__dict__["num_own"]
    trainer, model = fit(sigma=1e4, batch_size=40, max_epochs=10)
    seen["noise"] = torch.stack(model.__dict__["seen"])
    seen["weights"] = torch.cat([p.detach().flatten() for p in model.generator.parameters()])
    seen["ledger"], seen["epsilon"] = model.ledger.state_dict(), model.epsilon()
    trainer.save_checkpoint(OUT / "ten.ckpt")
    _, model = fit(sigma=1e4, batch_size=40, max_epochs=11, resume=OUT / "ten.ckpt")
    seen["resumed"] = model.ledger.num_steps
    torch.save(seen, OUT / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
