"""The part of a test's cases that runs by default, and cases that run as one test."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cases import each
from tests.conftest import LONG, put_shared_runs_first, pytest_collection_modifyitems

ENTRIES = [object() for _ in range(6)]
CASES = [(i, j) for i in range(6) for j in range(4)]


def items(num: int) -> list[Any]:
    """A test with two lists of parameters, one of them of two names, of which the first is the same in all entries."""
    marks = [pytest.mark.parametrize(("a", "b"), []).mark, pytest.mark.parametrize("c", []).mark]
    made = []
    for i, j in CASES:
        added: list[Any] = []
        made.append(
            SimpleNamespace(
                path=Path("test_any.py"),
                function=items,
                callspec=SimpleNamespace(params={"a": None, "b": ENTRIES[i], "c": ENTRIES[j]}),
                iter_markers=lambda name: iter(marks),
                get_closest_marker=lambda name: pytest.mark.one_in(num).mark if num else None,
                add_marker=added.append,
                added=added,
            )
        )
    return made


@pytest.mark.parametrize("num", [2, 3, 4])
def test_one_in_so_many_cases_runs_by_default(num: int) -> None:
    made = items(num)
    pytest_collection_modifyitems(made)
    default = [case for case, item in zip(CASES, made, strict=True) if not item.added]
    assert len(default) == len(CASES) // num
    assert {i for i, _ in default} == set(range(6))
    assert {j for _, j in default} == set(range(4))
    assert [item.added for item in made if item.added] == [[pytest.mark.slow]] * (len(CASES) - len(default))


def test_other_tests_run_all_cases() -> None:
    made = items(0)
    pytest_collection_modifyitems(made)
    assert not any(item.added for item in made)


def test_files_with_long_tests_come_first() -> None:
    names = ["test_any.py", "test_gpu.py", "test_other.py", "test_examples.py"]
    made: list[Any] = [SimpleNamespace(path=Path(name), get_closest_marker=lambda name: None) for name in names]
    pytest_collection_modifyitems(made)
    assert [item.path.name for item in made] == ["test_gpu.py", "test_examples.py", "test_any.py", "test_other.py"]
    assert {path.name for path in Path(__file__).parent.rglob("test_*.py")} >= LONG


def test_tests_that_start_shared_runs_come_first() -> None:
    """One of each file, and one of its slow tests, which run by themselves."""

    def item(path: str, fixture: str, *, slow: bool = False) -> Any:
        mark = object() if slow else None
        return SimpleNamespace(path=path, fixturenames=[fixture], get_closest_marker=lambda name: mark)

    made = [item("a", "tmp_path"), *(item(path, "ranks", slow=slow) for path in "bc" for slow in (True, False, False))]
    plain, b_slow, b, b_other, c_slow, c, c_other = made
    put_shared_runs_first(made)
    assert made == [b_slow, b, c_slow, c, plain, b_other, c_other]


def test_each_case_runs_and_the_one_that_fails_is_named(tmp_path: Path) -> None:
    seen: list[tuple[int, str]] = []

    @each("letter", "ab")
    @each("left, right", [(1, 1), (2, 3)])
    def compare(left: int, right: int, letter: str, tmp_path: Path) -> None:
        seen.append((left, letter))
        assert left == right or letter == "a"

    assert [*inspect.signature(compare).parameters] == ["tmp_path"]
    with pytest.raises(AssertionError) as raised:
        compare(tmp_path=tmp_path)
    assert seen == [(1, "a"), (2, "a"), (1, "b"), (2, "b")]
    assert raised.value.__notes__ == ["in the case {'left': 2, 'right': 3}", "in the case {'letter': 'b'}"]
