"""The shape of the package: the core never imports lightning, and nothing slow is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_dp
from lightning_dp import datalens
from tests.sources import tree_of

PACKAGE = Path(lightning_dp.__file__).parent
LIGHTNING = {"lightning", "pytorch_lightning"}
SLOW = {"opacus", "dp_accounting", "scipy", "torchmetrics"}
SHELL = {"strategies", "callbacks", "cli", "__init__.py"}
SHELL_FILES = {
    "fabric.py",
    "datalens/module.py",
    "datalens/run.py",
    "datalens/trainer_checks.py",
}  # the core of DataLens is next to them
CORE = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in SHELL and path.relative_to(PACKAGE).as_posix() not in SHELL_FILES
)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def imported_at_once(path: Path) -> set[str]:
    """Packages that a file imports when it is itself imported, not later inside a function or for a type checker."""
    names: set[str] = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_core_never_imports_lightning() -> None:
    def is_shell(name: str) -> bool:
        return name.split(".")[0] in LIGHTNING or name.startswith(("lightning_dp.strategies", "lightning_dp.callbacks"))

    names = {path.relative_to(PACKAGE).as_posix(): {*filter(is_shell, imported(path))} for path in CORE}
    assert len(names) > 150
    assert {path: found for path, found in names.items() if found} == {}


def test_optional_packages_are_imported_where_used() -> None:
    """Neither an import of a part of this package nor its help waits for them."""
    optional = {
        "matplotlib",
        "rich",
        "jsonargparse",
        "sklearn",
        "pandas",
        "transformers",
        "peft",
        "cryptography",
        "mkl_random",
    }
    loggers = {"tensorboard", "wandb", "mlflow"}
    assert {
        path.name: found for path in PACKAGE.rglob("*.py") if (found := imported_at_once(path) & (optional | loggers))
    } == {}
    assert not [path.name for path in PACKAGE.rglob("*.py") if "opacus" in imported_at_once(path)]


def loaded(*stages: str) -> list[set[str]]:
    """Packages in ``sys.modules`` once a new process has run some code, after each part of it."""
    told = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})\n"
    command = [sys.executable, "-W", "ignore", "-c", told.join([*stages, ""])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent)
    return [set(line.split()) for line in done.stdout.splitlines()]


LOOP = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_dp.loop import make_private
x = torch.randn(128, 64)
loader = DataLoader(TensorDataset(x, x[:, :10].argmax(1)), batch_size=32)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
with make_private(model, optimizer, loader, loss_fn, epochs=2, target_epsilon=2.0, microbatch_size=20) as private:
    for _ in range(2):
        for batch in private.loader:
            private.step(batch)
    state = private.state_dict()
    assert "8 steps" in private.privacy_statement()
"""


def test_each_part_loads_what_it_needs() -> None:
    """The package alone nothing slow; every module of the core no lightning, also not through a third party.

    opacus is left to the calls that need it.
    """
    modules = [".".join(("lightning_dp", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in CORE]
    wanted = {name.removesuffix(".__init__") for name in modules}
    folders = [*ABOVE, "datalens", "loop", "reporting"]
    assert {f"lightning_dp.{name}" for name in folders} <= wanted
    package, core = loaded(
        "import lightning_dp",
        # a subpackage and a public name, each as an attribute of the package
        "assert lightning_dp.accounting.Ledger is lightning_dp.Ledger\n"
        f"import importlib\nfor name in {sorted(wanted)!r}: importlib.import_module(name)\n"
        "assert callable(lightning_dp.fix)",  # not its file, which was imported by name
    )
    assert not package & {"torch", "numpy", *SLOW, *LIGHTNING}
    assert "torch" in core
    assert not core & {"opacus", *LIGHTNING}


@pytest.mark.slow
def test_a_loop_that_trains_loads_no_lightning() -> None:
    assert not loaded(LOOP)[0] & LIGHTNING


PILLARS = ["accounting", "auditing", "clipping", "masks", "noise", "per_sample", "sampling"]


#: Layers that a folder of the core must not know: those above it.
ABOVE = {
    **dict.fromkeys([*PILLARS, "system"], ("sandbox", "step", "trials", "loop")),
    "sandbox": ("step", "trials", "loop"),
    "step": ("trials", "loop"),
    "trials": ("loop",),
}


@pytest.mark.parametrize("folder", ABOVE)
def test_folders_do_not_know_the_layers_above(folder: str) -> None:
    """Also not for a type alone."""
    paths = list((PACKAGE / folder).rglob("*.py"))
    names = {name.split(".")[1] for path in paths for name in imported(path) if name.startswith("lightning_dp.")}
    assert "per_sample" in names or folder not in ("sandbox", "step", "trials")
    assert not names & {*ABOVE[folder]}


@pytest.mark.parametrize("package", [lightning_dp, datalens], ids=lambda package: package.__name__)
def test_lazy_packages_hide_no_mistake(package: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Typo'"):
        _ = package.Typo
    assert set(package.__all__) <= set(dir(package))


def test_public_names_are_documented() -> None:
    for name in lightning_dp.__all__:
        assert getattr(lightning_dp, name).__doc__


#: Files that exist to touch private API of Lightning and torch, one function each.
SEAMS = {"strategies/_lightning.py", "strategies/_progress.py", "system/torch_private.py", "per_sample/_torch.py"}
#: Public although they begin with an underscore: methods of named tuples, and a module.
PUBLIC_UNDERSCORES = {"_replace", "_asdict", "_fields", "_make", "_pytree"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_UNDERSCORES


def is_own(node: ast.AST) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_reads(tree: ast.Module) -> list[str]:
    """``x._name`` and ``getattr(x, "_name")`` where x is neither self nor cls, also if x is of the same class; and
    ``from x import _name``.
    """
    found = list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_dp"):
            found.extend(f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
        name, target = "", None
        if isinstance(node, ast.Attribute):
            name, target = node.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            named = node.args[1]
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(named, ast.Constant):
                name, target = str(named.value), node.args[0]
        if is_private(name) and target is not None and not is_own(target):
            found.append(f"{ast.unparse(target)}.{name}")
    return found


def test_foreign_reads_are_found() -> None:
    source = (
        "import wrappers\n"
        "from torch import _v\n"
        "def _z(): wrappers._x = 1\n"
        "class A:\n"
        "    def f(self, other, shape):\n"
        "        self._x = super()._y + other._x + shape._replace(a=1) + other.__dict__\n"
        "        return other._z, getattr(other, '_w', 0), self._parent._q\n"
        "class B(A):\n"
        "    def g(self, one):\n"
        "        return self._x, one._x\n"
        "def h(one): return one._x\n"
    )
    expected = ["one._x", "one._x", "other._w", "other._x", "other._z", "self._parent._q", "torch._v", "wrappers._x"]
    assert sorted(foreign_reads(ast.parse(source))) == expected


def test_no_class_reads_the_private_attributes_of_another() -> None:
    """Private names of Lightning and torch count, too, except in the files that exist to touch them."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: foreign_reads(tree_of(path)) for name, path in paths.items() if name not in SEAMS}
    assert {name: reads for name, reads in found.items() if reads} == {}


def test_callbacks_know_the_strategies_by_what_they_offer() -> None:
    """Of the folder ``strategies`` they import Lightning's private API in functions, and nothing else."""
    known = {path.name: imported(path) for path in (PACKAGE / "callbacks").glob("*.py")}
    found = {name: {used for used in names if "lightning_dp.strategies" in used} for name, names in known.items()}
    assert {used for names in found.values() for used in names} == {"lightning_dp.strategies._lightning"}
