"""Run by test_ddp.py in two processes: mechanisms together, and each rank writes down what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp import AdaptiveClipping, AutoThreshold, DPDDPStrategy, MagnitudePruning, RandomSparsification, TopAgg
from lightning_dp.clipping.bounds import NoisyGradientBound, NoisyRelease, QuantileBound
from tests.helpers import Classifier, Recorder, make_dataset, make_trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
OUT = Path(sys.argv[1])


class Nothing(Classifier):
    """No gradient at all: every norm is 0, and what is released in addition to the count is noise."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(torch.zeros_like(batch[0])).sum(1).mean() * 0.0


class Spy:
    """Follows what is handed to the all-reduce of a step, and what a bound learns from."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.counts: list[float] = []
        self.bounds: list[float] = []
        reduce = dist.all_reduce

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        for rule in (NoisyGradientBound, QuantileBound):
            self._follow(rule)

    def _follow(self, rule: Any) -> None:
        observe = rule.observe

        def spy(bound: Any, release: NoisyRelease) -> None:
            self.counts += release.statistics
            observe(bound, release)
            self.bounds.append(bound.value)

        rule.observe = spy

    def take(self) -> dict[str, Any]:
        """What was seen since the last call."""
        seen = {"sent": self.sent, "counts": self.counts, "bounds": self.bounds}
        self.sent, self.counts, self.bounds = [], [], []
        return seen


def fit(module: L.LightningModule, callbacks: list[Any], batch_size: int, epochs: int, **options: Any) -> list[Any]:
    """Trains in both processes; returns the gradients of every step."""
    recorder = Recorder()
    strategy = DPDDPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, "check_per_sample": False, **options})
    trainer = make_trainer(strategy, OUT, devices=2, callbacks=[*callbacks, recorder], max_epochs=epochs)
    trainer.fit(module, DataLoader(make_dataset(), batch_size=batch_size))
    return [torch.cat([gradient.flatten() for gradient in step.values()]) for step in recorder.before_step]


def main() -> None:
    spy, seen = Spy(), {}

    # steps on zero gradients with a counted bound
    fit(Nothing(lr=0.0), [AdaptiveClipping(count_noise=2.0)], batch_size=32, epochs=5)
    seen["count"] = spy.take()

    # masks: what is sent, and which coordinates are live on each rank
    callbacks = [
        RandomSparsification(0.8, schedule="constant", refresh=2, seed=4),
        MagnitudePruning(0.4),
        AutoThreshold(3.0),
    ]
    module = Classifier()
    with torch.no_grad():
        module.network[0].weight += RANK  # replicas begin with rank 0's weights, and so do scores
    # less noise than elsewhere: the bound would often stay at its floor
    gradients = fit(module, callbacks, batch_size=8, epochs=3, noise_multiplier=0.1)
    seen["masked"] = {**spy.take(), "live": [gradient != 0 for gradient in gradients]}
    seen["masked"]["weights"] = torch.cat([p.detach().flatten() for p in module.parameters()])

    # votes, in microbatches: each rank draws coins of its own, the sum is one
    module = Classifier()
    fit(module, [], batch_size=8, epochs=1, clipping=TopAgg(0.2), microbatch_size=3)
    seen["votes"] = torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.save(seen, OUT / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
