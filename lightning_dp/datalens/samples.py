"""Files of samples from the released generator."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_tensors(path: str | Path, features: Tensor, labels: Tensor) -> None:
    """Write samples with ``torch.save``, as a dictionary for ``torch.load(path, weights_only=True)``.

    Args:
        path: file to write.
        features: shape (n, ...).
        labels: shape (n,).
    """
    torch.save({"features": features.detach().cpu(), "labels": labels.detach().cpu()}, path)


def write_csv(
    path: str | Path,
    features: Tensor,
    labels: Tensor | None = None,
    *,
    columns: Sequence[str] | None = None,
    label_column: str = "label",
    bounds: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Write samples as a CSV table, one row per sample.

        with bounds: value = low + (feature + 1) / 2 x (high - low)

    **Guarantee**: post-processing of the samples if ``bounds`` are public. Minima and maxima of the private data are
    not public.

    Args:
        path: file to write.
        features: shape (n, columns).
        labels: shape (n,), or None to leave the column out.
        columns: column names; default: ``x0, x1, ...``.
        label_column: name of the label's column.
        bounds: one pair (low, high) per column, to undo a scaling to [-1, 1].

    Raises:
        ValueError: features that are not two-dimensional, or not one name and one pair of bounds per column.
    """
    if features.dim() != 2:
        raise ValueError(
            f"Expected features of shape (n, columns), got shape {tuple(features.shape)}. Write images as tensors."
        )
    num_columns = features.shape[1]
    names = [f"x{i}" for i in range(num_columns)] if columns is None else list(columns)
    for name, given in (("columns", names), ("bounds", bounds)):
        if given is not None and len(given) != num_columns:
            raise ValueError(
                f"Expected {num_columns} {name}, one per feature, got {len(given)}. Name each column once."
            )
    values = features.detach().double().cpu()
    if bounds is not None:
        low, high = torch.tensor(bounds, dtype=torch.float64).T
        values = low + (values + 1) / 2 * (high - low)
    rows = [[f"{value:.7g}" for value in row] for row in values.tolist()]
    if labels is not None:
        names = [*names, label_column]
        rows = [[*row, str(label)] for row, label in zip(rows, labels.tolist(), strict=True)]
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
