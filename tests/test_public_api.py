"""Names and signatures of everything public, frozen in ``public_api.txt``.

After an intended change, write the table again and read its diff: ``python -m tests.test_public_api >
tests/public_api.txt``
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning_dp

TABLE = Path(__file__).with_name("public_api.txt")


class Shown:
    """Text that a signature shows without quotation marks."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def as_written(annotation: Any) -> Any:
    text = getattr(annotation, "__forward_arg__", annotation)
    return Shown(text) if isinstance(text, str) else annotation


def signature(function: Any) -> str:
    """A signature without quotation marks and addresses, so that every version of Python shows the same."""
    found = inspect.signature(function)
    parameters = [
        each.replace(
            annotation=as_written(each.annotation),
            default=Shown(each.default.__name__) if inspect.isfunction(each.default) else each.default,
        )
        for each in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=as_written(found.return_annotation)))


def members(kind: type) -> list[str]:
    """Our public methods and properties: no fields, no hooks of Lightning or torch, nothing that a public base
    declares.
    """
    public = [value for each in lightning_dp.__all__ if isinstance(value := getattr(lightning_dp, each), type)]
    bases = [base for base in kind.__mro__ if base is kind or base not in public]
    ours = [base for base in bases if base.__module__.startswith("lightning_dp")]
    others = {name for base in kind.__mro__ if base not in ours for name in vars(base)}
    others |= {field.name for field in fields(kind)} if is_dataclass(kind) else set(getattr(kind, "_fields", ()))
    return sorted(name for name in {name for base in ours for name in vars(base)} - others if not name.startswith("_"))


def describe(name: str, value: Any) -> Iterator[str]:
    """One line per function, class, method and property."""
    if isinstance(value, ModuleType):
        public = getattr(value, "__all__", None) or [
            each for each, found in vars(value).items() if getattr(found, "__module__", None) == value.__name__
        ]
        for each in sorted(set(public) - set(lightning_dp.__all__)):
            if not each.startswith("_"):
                yield from describe(f"{name}.{each}", getattr(value, each))
    elif isinstance(value, type):
        yield f"class {name}" + ("" if issubclass(value, BaseException) else signature(value).removesuffix(" -> None"))
        for each in members(value):
            found = getattr(value, each)
            yield f"{name}.{each}{signature(found) if inspect.isroutine(found) else ''}"
    else:
        yield f"{name}{signature(value)}"


def table() -> str:
    lines = [line for name in sorted(lightning_dp.__all__) for line in describe(name, getattr(lightning_dp, name))]
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_frozen() -> None:
    assert table().splitlines() == TABLE.read_text().splitlines()


if __name__ == "__main__":
    print(table(), end="")
