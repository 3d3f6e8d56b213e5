"""``lightning-dp check``: how each layer of a module would be trained privately, and which layers must change."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lightning_dp.cli import output
from lightning_dp.per_sample.inspect import inspect

NOT_SEEN = (
    "Not seen from here: functions inside forward and the loss. The independence check at the first batch of a run "
    "sees them."
)


def check(options: argparse.Namespace) -> int:
    """Print the handling of each layer; return 1 if a layer must change, else 0."""
    module = load(options.target, options.init)
    layers = inspect(module)
    problems = [layer for layer in layers if layer.problem]
    if options.json:
        values = {"module": type(module).__name__, "private_as_it_is": not problems}
        output.write_json({**values, "layers": [asdict(layer) for layer in layers]})
        return int(bool(problems))
    rows = []
    for layer in layers:
        note = f"MUST CHANGE: {layer.problem}" if layer.problem else layer.handling
        note += f" With fix: {layer.fix}." if layer.fix else ""
        rows.append((layer.name or "(itself)", layer.kind, str(layer.num_trainable), note))
    output.write_table(("layer", "type", "trainable", "how it is handled"), rows)
    if problems:
        fixed = sum(bool(layer.fix) for layer in problems)
        output.write(
            f"\n{len(problems)} of {len(layers)} layers must change; "
            f"`module, changes = lightning_dp.fix(module)` does it for {fixed}."
        )
    else:
        output.write(f"\nAll layers ({len(layers)}) can be trained privately as they are. {NOT_SEEN}")
    return int(bool(problems))


def load(target: str, init: str | None) -> nn.Module:
    """Return the named module (``FILE.py:NAME`` or ``package.module:NAME``), or call the named class or function.

    Args:
        target: the argument as typed.
        init: arguments of the class or function as a JSON object.

    Raises:
        ValueError: the name does not exist, or the call fails.
        TypeError: the object, or the result of its call, is not a module.
    """
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise ValueError(f"Expected FILE.py:NAME or package.module:NAME, got {target!r}. Write my_module.py:MyModule.")
    source = _import(where)
    if not hasattr(source, name):
        found = [key for key, value in vars(source).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        raise ValueError(
            f"Expected a module named {name!r} in {where}, got none. Its modules are: {', '.join(found) or 'none'}."
        )
    made: Any = getattr(source, name)
    if not isinstance(made, nn.Module):
        made = _make(made, name, init)
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"Expected {name} to be or to make a torch.nn.Module, got {type(made).__name__}. Name a module."
        )
    return made


def _import(where: str) -> ModuleType:
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"Expected a Python file, got {where!r}, which does not exist. Check the path.")
    try:
        if path.suffix != ".py":
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(where)
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        source = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = source
        spec.loader.exec_module(source)
    except Exception as error:  # whatever the user's file does
        raise ValueError(
            f"Expected {where} to import, got {type(error).__name__}: {error}. Run it with python first."
        ) from error
    return source


def _make(maker: Any, name: str, init: str | None) -> Any:
    try:
        arguments = {} if init is None else json.loads(init)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected --init to be a JSON object, got {init!r}: {error}.") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"Expected --init to be a JSON object, got {init!r}. Write '{{\"hidden\": 64}}'.")
    try:
        return maker(**arguments)
    except Exception as error:  # whatever the user's constructor does
        raise ValueError(
            f"Expected {name}(**{arguments}) to work, got {type(error).__name__}: {error}. Pass its arguments: "
            "--init '{\"hidden\": 64}'."
        ) from error
