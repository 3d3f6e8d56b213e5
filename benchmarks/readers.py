"""Readers of the file formats of the public data sets: IDX, a pickle of arrays, census rows, tables, sentences."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any, ClassVar

import numpy as np

#: Column -> public bounds of a number: printed in the survey's description or limits of the census form, not taken from
#: the data.
ADULT_BOUNDS = {
    "age": (17, 90),
    "education-num": (1, 16),
    "capital-gain": (0, 99_999),
    "capital-loss": (0, 99_999),
    "hours-per-week": (1, 99),
}
#: Numbers that span orders of magnitude: log(1 + x), scaled by its largest possible value.
ADULT_LOGARITHMIC = ("capital-gain", "capital-loss")
#: Column -> its categories, as the survey's description lists them; anything else (a question mark) has no category.
ADULT_CATEGORIES = {
    "workclass": (
        "Private, Self-emp-not-inc, Self-emp-inc, Federal-gov, Local-gov, State-gov, Without-pay, Never-worked"
    ),
    "marital-status": (
        "Married-civ-spouse, Divorced, Never-married, Separated, Widowed, Married-spouse-absent, Married-AF-spouse"
    ),
    "occupation": "Tech-support, Craft-repair, Other-service, Sales, Exec-managerial, Prof-specialty, "
    "Handlers-cleaners, Machine-op-inspct, Adm-clerical, Farming-fishing, Transport-moving, Priv-house-serv, "
    "Protective-serv, Armed-Forces",
    "relationship": "Wife, Own-child, Husband, Not-in-family, Other-relative, Unmarried",
    "race": "White, Asian-Pac-Islander, Amer-Indian-Eskimo, Other, Black",
    "sex": "Female, Male",
    "native-country": "United-States",
}
#: Numbers of an encoded row.
ADULT_WIDTH = len(ADULT_BOUNDS) + sum(listed.count(",") + 1 for listed in ADULT_CATEGORIES.values())
ADULT_COLUMNS = [
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
]


def idx(content: bytes) -> np.ndarray:
    """Return the array of an IDX file of unsigned bytes.

    Raises:
        ValueError: another type of numbers, or a length that does not fit the header.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"Expected an IDX file of unsigned bytes, got a header of {content[:3]!r}. Check the file.")
    dimensions = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if len(content) != 4 + 4 * dimensions + math.prod(shape):
        raise ValueError(
            f"Expected {math.prod(shape)} numbers, got {len(content) - 4 - 4 * dimensions}. Fetch the file again."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler of NumPy arrays and plain containers; it calls nothing else that a pickle names."""

    #: Name in a pickle -> what it stands for; NumPy keeps the first of them in a private place.
    ALLOWED: ClassVar = {
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a constructor of arrays by name.

        Raises:
            pickle.UnpicklingError: the pickle names anything else.
        """
        if f"{module}.{name}" in self.ALLOWED:
            return self.ALLOWED[f"{module}.{name}"]
        raise pickle.UnpicklingError(
            f"Expected a pickle of arrays, got one that calls {module}.{name}. Do not load it."
        )


def mnist_pickle(content: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (images as bytes of 28 x 28, labels) of each part of a pickle whose images hold fractions of 256.

    Raises:
        pickle.UnpicklingError: the pickle holds anything but arrays.
    """
    parts = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    return [(np.rint(images * 256).astype(np.uint8).reshape(-1, 28, 28), labels) for images, labels in parts]


def adult(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the census as numbers and whether the income exceeds 50,000 dollars.

    Numbers go to [-1, 1] by ``ADULT_BOUNDS``; each category becomes one column of 0 or 1. The sampling weight
    ``fnlwgt`` and the words of ``education`` (its number says the same) are left out. Nothing depends on another row.
    """
    rows = [
        dict(zip(ADULT_COLUMNS, (item.strip() for item in line.split(",")), strict=True))
        for line in text.splitlines()
        if line.count(",") == 14
    ]
    columns = [_number(np.array([float(row[name]) for row in rows]), name) for name in ADULT_BOUNDS]
    for name, listed in ADULT_CATEGORIES.items():
        columns += [np.array([row[name] == category for row in rows], np.float32) for category in listed.split(", ")]
    labels = np.array([row["income"].rstrip(".") == ">50K" for row in rows], np.int64)
    return np.stack(columns, axis=1).astype(np.float32), labels


def _number(values: np.ndarray, name: str) -> np.ndarray:
    low, high = ADULT_BOUNDS[name]
    values = np.clip(values, low, high)
    if name in ADULT_LOGARITHMIC:
        values, low, high = np.log1p(values), 0, math.log1p(high)
    return 2 * (values - low) / (high - low) - 1


def keel(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a comma-separated table and its last column: labels as numbers, letters from A = 0."""
    rows = [[item.strip() for item in line.split(",")] for line in text.splitlines() if line.strip()]
    labels = [ord(row[-1]) - ord("A") if row[-1].isalpha() else int(row[-1]) for row in rows]
    return np.array([row[:-1] for row in rows], np.float32), np.array(labels, np.int64)


def ratings(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the sentences of lines "number, mean rating, sentence", separated by tabs, and whether the rating is above
    0.
    """
    rows = [line.split("\t", 2) for line in text.splitlines() if line.strip()]
    return np.array([row[2].strip() for row in rows]), np.array([float(row[1]) > 0 for row in rows], np.int64)
