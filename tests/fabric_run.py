"""Run by test_fabric.py in two processes: each case trains under Fabric's DDP, and each rank writes down what it
saw.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import PrivacyError
from lightning_dp.fabric import FabricPrivacy
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_dataset

RANK, OUT = int(os.environ.get("LOCAL_RANK", 0)), Path(sys.argv[1])


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def no_signal(model: nn.Module, batch: Any) -> Tensor:
    return 0.0 * model(batch[0]).mean()


def classifier() -> nn.Module:
    torch.manual_seed(RANK)  # the ranks begin with different weights
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)).double()


def loader(size: int = 40, batch_size: int = 4) -> DataLoader:
    return DataLoader(make_dataset(size, dtype=torch.float64), batch_size=batch_size)


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    seen: dict[str, Any] = {}

    dp = FabricPrivacy(noise_multiplier=0.0, max_grad_norm=0.5, microbatch_size=3)
    original = classifier()
    model, optimizer, batches = dp.setup(fabric, original, torch.optim.SGD(original.parameters(), lr=0.1), loader())
    assert model._forward_module is original
    seen["steps"] = []
    for batch in itertools.chain(batches, batches, batches, batches):  # so that ranks differ in microbatches somewhere
        weights = {name: p.detach().clone() for name, p in original.named_parameters()}
        records = [part for _, part in batch.microbatches]
        dp.backward(mean_loss, batch)
        gradients = {name: p.grad.clone() for name, p in original.named_parameters()}
        seen["steps"].append((weights, records, gradients))
        optimizer.step()
    dp.close()

    model = nn.Linear(200, 100)
    data = DataLoader(TensorDataset(torch.zeros(40, 200)), batch_size=4)
    dp = FabricPrivacy(noise_multiplier=0.7, max_grad_norm=0.3, steps=1)
    model, optimizer, batches = dp.setup(fabric, model, torch.optim.SGD(model.parameters(), lr=1.0), data)
    dp.backward(no_signal, next(iter(batches)))
    seen["noise"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    dp.close()

    def of_other_rank(model: nn.Module, batch: Any) -> Tensor:
        rare = (batch[0].abs().amax() > 8).double()
        return mean_loss(model, batch) * (1 - 2 * (fabric.all_gather(rare) - rare).abs().amax())

    def averaged(model: nn.Module, batch: Any) -> Tensor:  # a figure for a log; ranks differ in microbatches
        loss = mean_loss(model, batch)
        seen["average"] = float(fabric.all_reduce(loss.detach()))
        fabric.barrier()
        return loss

    model = classifier()
    dp = FabricPrivacy(noise_multiplier=0.0, microbatch_size=3)
    model, optimizer, batches = dp.setup(fabric, model, torch.optim.SGD(model.parameters(), lr=1.0), loader(300))
    try:
        dp.backward(of_other_rank, next(iter(batches)))
    except PrivacyError as error:
        seen["refused"] = str(error)
    for batch in itertools.islice(batches, 8):
        dp.backward(averaged, batch)
    dp.close()

    def start() -> tuple[FabricPrivacy, Any, Any, Any]:
        dp = FabricPrivacy(target_epsilon=3.0, target_delta=1e-3, epochs=10, microbatch_size=2)
        model = classifier()
        return dp, *dp.setup(fabric, model, torch.optim.Adam(model.parameters(), lr=0.1), loader(40, 1))

    def train(dp: FabricPrivacy, optimizer: Any, batches: Any, steps: int) -> None:
        while dp.steps_taken < steps:
            for batch in batches:
                seen["empty"] = seen.get("empty", 0) + (not batch)
                dp.backward(mean_loss, batch)
                optimizer.step()
                if dp.steps_taken == steps:
                    break

    dp, model, optimizer, batches = start()
    train(dp, optimizer, batches, 30)
    sigma = dp.plan.noise_multiplier
    fabric.save(OUT / "last.ckpt", {"model": model, "optimizer": optimizer, "lightning_dp": dp})
    dp.close()
    dp, model, optimizer, batches = start()
    fabric.load(OUT / "last.ckpt", {"model": model, "optimizer": optimizer, "lightning_dp": dp})
    assert dp.plan.noise_multiplier == sigma
    train(dp, optimizer, batches, 200)
    seen["epsilon"], seen["facts"] = dp.epsilon(), (dp.ledger.num_steps, dp.plan.expected_batch_size, dp.steps_left)
    seen["weights"] = torch.cat([p.detach().flatten() for p in model.parameters()])
    dp.close()
    torch.save(seen, OUT / f"rank{RANK}.pt")
    fabric.barrier()


if __name__ == "__main__":
    main()
