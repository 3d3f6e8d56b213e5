"""Who draws noise and who writes a gradient: every call and assignment in the package, found in its syntax trees.

A file that starts to do either must enter a table below, with the reason why nothing raw is released there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lightning_dp
from tests.cases import each
from tests.sources import tree_of

PACKAGE = Path(lightning_dp.__file__).parent

DRAWS_NOISE = {
    "auditing/records.py": "makes random records for an audit: inputs, not noise on a release",
    "datalens/release.py": "releases sums of votes, and writes the ledger in the same function",
    "noise/gaussian.py": "is the noise",
    "noise/redrawn.py": "is the noise of streams: correlated, drawn again from its key",
    "noise/sources.py": "is where the noise is drawn from",
    "per_sample/custom.py": "makes a random backprop, to compare a user's rule with autograd",
    "step/accumulator.py": "begins a sum with the noise of its release",
    "step/noising.py": "adds what the release states, before or after the samples are added",
    "step/step.py": "asks noising.py for the noise of the release that it settled and recorded",
}

WRITES_GRADIENTS = {
    "per_sample/tracking/learning.py": "puts back what was there before a pass of its own",
    "per_sample/parts.py": "fills parts of its own tensors in: per-sample gradients, not p.grad",
    "per_sample/single.py": "puts back what was there before a pass of its own",
    "step/accumulator.py": "writes the noised sum: the release",
    "trials/probe.py": "gives rehearsed steps on trial a made-up gradient, and takes raw ones away",
    "step/reduction.py": "averages public gradients over the ranks",
    "sandbox/sandbox.py": "puts back what was there before user code ran on trial",
}

DRAWING_ANYWHERE = {"normal_", "log_normal_", "normal", "standard_normal", "multivariate_normal", "gauss", "randn"}
DRAWING_ANYWHERE |= {"randn_like", "begin_with_noise"}
DRAWING_ON_NOISE = {"add_", "fill_", "add", "begin"}


def identifiers(node: ast.AST) -> list[str]:
    """Names along a chain of attributes, subscripts and calls: ``a.b[0].c()`` has a, b and c."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*identifiers(node.value), node.attr]
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return identifiers(node.value)
    return identifiers(node.func) if isinstance(node, ast.Call) else []


def assignments(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets with their values; of ``a, b = x, y`` one by one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node.target, node.value
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def names_of_noise(tree: ast.AST) -> set[str]:
    """Names that a file annotates with a class of noise, or assigns from one or from another such name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation and "Noise" in ast.unparse(node.annotation):
            names |= {node.arg} if isinstance(node, ast.arg) else set(identifiers(node.target)[-1:])
    pairs = [(target, set(identifiers(value)), makes_noise(value)) for target, value in assignments(tree)]
    known = -1
    while known < len(names):  # a name may be passed on, and on again
        known = len(names)
        for target, values, is_made in pairs:
            if is_made or values & names:
                names |= set(identifiers(target)[-1:])
    return names


def makes_noise(tree: ast.AST) -> bool:
    """Whether something in an expression calls a class of noise."""
    calls = (identifiers(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(name.endswith("Noise") for chain in calls for name in chain[-1:])


def draws(tree: ast.AST) -> Iterator[ast.AST]:
    """Calls that draw normals from any generator, and calls of a noise object that put noise into a tensor."""
    names = names_of_noise(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (chain := identifiers(node.func)):
            *receiver, method = chain
            is_noise = any(name in names or "noise" in name.lower() for name in receiver)
            if method in DRAWING_ANYWHERE or (method in DRAWING_ON_NOISE and is_noise):
                yield node


def writes(tree: ast.AST) -> Iterator[ast.AST]:
    """Assignments to a ``.grad`` or a part of one of anything but None, and calls that change one in place."""
    cleared = {
        id(target) for target, value in assignments(tree) if isinstance(value, ast.Constant) and value.value is None
    }
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store) and id(node) not in cleared
        if stored and isinstance(node, (ast.Attribute, ast.Subscript)) and "grad" in identifiers(node)[1:]:
            yield node
        elif isinstance(node, ast.Call) and (chain := identifiers(node.func)):
            *receiver, method = chain
            in_place = method.endswith("_") and not method.endswith("__")
            to_lists = in_place and method.startswith("_foreach") and has_gradient(node.args[0])
            by_name = method in ("setattr", "__setattr__") and any(
                isinstance(each, ast.Constant) and each.value == "grad" for each in node.args
            )
            out = any(keyword.arg == "out" and has_gradient(keyword.value) for keyword in node.keywords)
            if (in_place and "grad" in receiver) or to_lists or by_name or out:
                yield node


def has_gradient(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "grad" for node in ast.walk(tree))


def found(search: Callable[[ast.AST], Iterator[ast.AST]]) -> dict[str, list[str]]:
    """Lines of the package, by file."""
    lines = {
        path.relative_to(PACKAGE).as_posix(): [
            f"{node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]
            for node in search(tree_of(path))
        ]
        for path in PACKAGE.rglob("*.py")
    }
    return {path: each for path, each in sorted(lines.items()) if each}


def test_only_the_files_of_the_table_draw_noise() -> None:
    lines = found(draws)
    assert lines.keys() == DRAWS_NOISE.keys(), lines


def test_only_the_files_of_the_table_write_gradients() -> None:
    lines = found(writes)
    assert lines.keys() == WRITES_GRADIENTS.keys(), lines


@each(
    "code",
    [
        "self._noise.add_(sums, 1.0)",
        "self._noise.fill_(sums, 1.0)",
        "step.noise.add(accumulator, release)",
        "self.noises[0].fill_(sums, std=1.0)",
        "GaussianNoise().add_(sums, 1.0)",
        "source = GaussianNoise(seed=1)\nother = source\nother.fill_(sums, 1.0)",
        "def f(source: GaussianNoise | None): self.x, self.y = 1, source\nself.y.add_(sums, 1.0)",
        "accumulator.begin_with_noise(source, 1.0)",
        "sums.normal_(0, 1)",
        "torch.randn_like(sums)",
        "from torch import randn\nrandn(3)",
        "np.random.default_rng().standard_normal(3)",
    ],
)
def test_every_draw_is_seen(code: str) -> None:
    assert list(draws(ast.parse(code)))


@each(
    "code",
    [
        "p.grad = sums",
        "p.grad += sums",
        "p.grad: Tensor = sums",
        "p.grad, other = sums, None",
        "for p.grad in gradients: pass",
        "p.grad[0] = sums",
        "p.grad.data = sums",
        "setattr(p, 'grad', sums)",
        "p.grad.copy_(sums)",
        "p.grad.view(-1)[0].mul_(2)",
        "torch.add(a, b, out=p.grad)",
        "torch._foreach_mul_([p.grad for p in parameters], 2)",
    ],
)
def test_every_write_is_seen(code: str) -> None:
    assert list(writes(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "p.grad = None",
        "kept, p.grad = p.grad, None",
        "sums.add_(p.grad)",
        "kept = p.grad",
        "self.gradient.add_(sums)",
        "sums.fill_(0.0)",
        "grad = 1",
    ],
)
def test_nothing_else_is_taken_for_a_draw_or_a_write(code: str) -> None:
    assert not [*draws(ast.parse(code)), *writes(ast.parse(code))]
