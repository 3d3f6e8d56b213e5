"""The networks to start from, and samples in files."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_dp.datalens import (
    ConvDiscriminator,
    ConvGenerator,
    MLPDiscriminator,
    MLPGenerator,
    write_csv,
    write_tensors,
)
from lightning_dp.datalens.teachers import check_discriminator

LABELS = torch.tensor([0, 1, 2, 1])
NETWORKS = {
    "table": (MLPGenerator(3, 6, num_classes=3), MLPDiscriminator(6, num_classes=3), (6,)),
    "grey 8x8": (
        ConvGenerator(3, image_size=8, num_classes=3, width=4),
        ConvDiscriminator(image_size=8, num_classes=3, width=4),
        (1, 8, 8),
    ),
    "colour 12x12": (
        ConvGenerator(3, image_size=12, channels=3, num_classes=3, width=4),
        ConvDiscriminator(image_size=12, channels=3, num_classes=3, width=4),
        (3, 12, 12),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_range_and_labels(name: str) -> None:
    generator, discriminator, shape = NETWORKS[name]
    z = torch.rand(1, 3).expand(4, 3)
    samples = generator(z, LABELS)
    assert samples.shape == (4, *shape)
    assert float(generator(1e4 * z, LABELS).detach().abs().max()) <= 1
    assert discriminator(samples, LABELS).shape == (4, 1)
    # conditioned on labels: the same z, another label, another answer
    torch.testing.assert_close(samples[1], samples[3])
    assert not torch.allclose(samples[0], samples[1])
    logits = discriminator(samples[:1].expand(4, *shape), LABELS)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_are_treated_alone(name: str) -> None:
    generator, discriminator, _ = NETWORKS[name]
    check_discriminator(discriminator)
    z = torch.rand(4, 3)
    together = generator(z, LABELS)
    torch.testing.assert_close(together[2:3], generator(z[2:3], LABELS[2:3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        discriminator(together, LABELS)[2:3], discriminator(together[2:3], LABELS[2:3]), rtol=1e-4, atol=1e-5
    )


def test_unbounded_tables_and_sizes() -> None:
    assert not any(isinstance(layer, nn.Tanh) for layer in MLPGenerator(3, 6, bounded=False).layers)
    for network in (lambda: ConvGenerator(3, image_size=10), lambda: ConvDiscriminator(image_size=2)):
        with pytest.raises(ValueError, match="multiple of 4"):
            network()


def read(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_csv_holds_columns_labels_and_undone_scaling(tmp_path: Path) -> None:
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    path = tmp_path / "table.csv"
    write_csv(path, features, torch.tensor([3, 1]), columns=["age", "height"], bounds=[(0, 100), (1.0, 2.0)])
    assert read(path) == [["age", "height", "label"], ["0", "1.5", "3"], ["100", "1.75", "1"]]
    write_csv(path, features)
    assert read(path) == [["x0", "x1"], ["-1", "0"], ["1", "0.5"]]
    write_csv(path, features, torch.tensor([0, 1]), label_column="income")
    assert read(path)[0] == ["x0", "x1", "income"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"columns": ["a"]}, "2 columns"), ({"bounds": [(0.0, 1.0)] * 3}, "2 bounds")],
)
def test_csv_of_another_width(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_csv(tmp_path / "t.csv", torch.zeros(4, 2), **options)
    with pytest.raises(ValueError, match="shape"):
        write_csv(tmp_path / "t.csv", torch.zeros(4, 2, 2))


def test_tensors_are_read_back(tmp_path: Path) -> None:
    features = torch.rand(4, 2, requires_grad=True)
    write_tensors(tmp_path / "samples.pt", features, LABELS)
    read_back = torch.load(tmp_path / "samples.pt", weights_only=True)
    torch.testing.assert_close(read_back["features"], features.detach())
    assert torch.equal(read_back["labels"], LABELS)
