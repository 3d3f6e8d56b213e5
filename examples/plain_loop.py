"""A plain PyTorch loop, no Trainer and no import of lightning: private digits at epsilon 3.

    python examples/plain_loop.py            # about 10 seconds on two cores
    python examples/plain_loop.py --smoke    # two epochs

``train`` is all that a private run takes. Model, optimizer, loader and loss function know nothing of privacy.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.loop import make_private


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, loader: DataLoader, epochs: int) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=epochs * len(loader))
    with make_private(
        model, optimizer, loader, loss_fn, epochs=epochs, target_epsilon=3.0, target_delta=1e-5
    ) as private:
        for epoch in range(epochs):
            for batch in private.loader:
                private.step(batch)
                scheduler.step()
            print(f"epoch {epoch}: epsilon {private.epsilon():.3f}")
        return private.privacy_statement()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    options = parser.parse_args()
    epochs = 2 if options.smoke else options.epochs
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0 - 0.3, labels, test_size=360, random_state=0, stratify=labels)
    x_train, x_test, y_train, y_test = (torch.as_tensor(part) for part in parts)
    torch.manual_seed(0)  # weights only: sampling and noise do not follow from it
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    print(train(model, DataLoader(TensorDataset(x_train.float(), y_train), batch_size=256, shuffle=True), epochs))
    accuracy = float((model(x_test.float()).argmax(1) == y_test).float().mean())
    print(f"test accuracy: {accuracy:.3f}")
    assert accuracy >= (0.3 if options.smoke else 0.88), f"Expected an accuracy of at least 0.88, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
