"""A loop of your own under Lightning Fabric: private digits, saved half-way by ``fabric.save`` and resumed.

    python examples/fabric_loop.py               # about 15 seconds on two cores
    python examples/fabric_loop.py --devices 2   # two processes: one all-reduce per step
    python examples/fabric_loop.py --smoke       # two epochs

``dp.setup`` takes the place of ``fabric.setup`` and ``fabric.setup_dataloaders``, ``dp.backward(loss_fn, batch)`` that
of ``fabric.backward(loss)``: the loss function also runs on microbatches, and where nobody was drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.fabric import FabricPrivacy

OUT = Path(__file__).parent / "out" / "fabric_loop"


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def train(fabric: Fabric, data: TensorDataset, *, epochs: int, until: int, checkpoint: Path, resume: bool) -> tuple:
    """Trains to the end of an epoch, from the beginning or from a checkpoint."""
    dp = FabricPrivacy(target_epsilon=3.0, target_delta=1e-5, epochs=epochs)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    loader = DataLoader(data, batch_size=256 // fabric.world_size)  # of one process
    model, optimizer, batches = dp.setup(fabric, net, torch.optim.SGD(net.parameters(), lr=1.0), loader)
    state = {"model": model, "optimizer": optimizer, "lightning_dp": dp, "epoch": 0}
    if resume:
        fabric.load(checkpoint, state)
    for epoch in range(state["epoch"], until):
        for batch in batches:
            dp.backward(loss_fn, batch)
            optimizer.step()
        fabric.print(f"epoch {epoch}: epsilon {dp.epsilon():.3f}")
    fabric.save(checkpoint, {**state, "epoch": until})
    dp.close()
    return model, dp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    options = parser.parse_args()
    epochs = 2 if options.smoke else options.epochs
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0 - 0.3, labels, test_size=360, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    data = TensorDataset(x_train.float(), y_train)
    fabric = Fabric(accelerator="cpu", devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)  # weights only: sampling and noise do not follow from it
    checkpoint = OUT / "last.ckpt"
    train(fabric, data, epochs=epochs, until=epochs // 2, checkpoint=checkpoint, resume=False)
    model, dp = train(fabric, data, epochs=epochs, until=epochs, checkpoint=checkpoint, resume=True)
    fabric.print(dp.privacy_statement())
    accuracy = float((model(x_test.float()).argmax(1) == y_test).float().mean())
    fabric.print(f"test accuracy: {accuracy:.3f}")
    assert dp.steps_left == 0
    assert 2.9 < dp.epsilon() <= 3.0
    assert accuracy >= (0.3 if options.smoke else 0.85), f"Expected an accuracy of at least 0.85, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
