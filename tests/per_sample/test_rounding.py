"""No record adds more than the bound where its contributions cancel: norm and sum round differently.

Every rule, memory setting, mask and clipping, in one contract. A record consists of ``T`` contributions that add up to
zero, or nearly so, of any size. The other samples have zero gradients, so all that is in the buffer is the record's
contribution.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import clipping as clippings
from lightning_dp.clipping import (
    AutomaticClipping,
    Clipping,
    FactorClipping,
    FlatClipping,
    PerLayerClipping,
    PSACClipping,
)
from lightning_dp.per_sample import PerSampleEngine, SingleSampleEngine, rules
from lightning_dp.per_sample.rules import Rule
from lightning_dp.per_sample.tracking.leaves import LeafRule
from lightning_dp.per_sample.tracking.registered import Registered
from lightning_dp.step.accumulator import Accumulator
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.samples import Samples
from tests import reference
from tests.per_sample.checks import make_engine, run_batch
from tests.per_sample.rule_cases import CASES, HOWS, Arranged

WAYS: list[dict[str, str]] = [{}, {"memory": "lean"}, {"grad_sample": "materialize"}]
#: Each case in each arrangement, with each memory setting; by default with one of them in turn.
ARRANGED = [
    pytest.param(name, how, way, id=f"{name}-{how}-{way}", marks=() if w == (i + j) % len(WAYS) else pytest.mark.slow)
    for i, name in enumerate(CASES)
    for j, how in enumerate(HOWS)
    for w, way in enumerate(WAYS)
]
CLIPPINGS: list[Clipping] = [
    FlatClipping(1.0),
    AutomaticClipping(gamma=0.0),
    AutomaticClipping(),
    PerLayerClipping(0.7),
    PSACClipping(gamma=0.0),
]
#: Sizes of inputs and backprops, with the relative change of the largest contribution in units of rounding: the sum of
#: all is
#: zero, or somewhat above rounding.
SIZES: dict[torch.dtype, list[tuple[float, float]]] = {
    torch.float32: [(1.0, 0), (1e9, 0), (1e9, 5), (1e9, 200), (3.3e12, 0), (3.3e12, 200), (1e21, 0)],
    torch.float64: [(3.3e21, 0), (3.3e21, 200)],
}


def coefficients(num: int) -> Tensor:
    """Numbers that add up to exactly zero: (3, 5, -8) times powers of two, in an order in which partial sums are
    large.
    """
    powers = 2.0 ** torch.tensor([0, 9, 4, 13, 2, 7, 11, 5])
    triples = [power * torch.tensor([3.0, 5.0, -8.0]) for power in powers[: (num + 2) // 3]]
    return torch.stack(triples, 1).flatten()[:num] if num % 3 == 0 else torch.cat([triples[0], torch.zeros(num - 3)])


def record(module: Arranged, scale: float, nearly: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and backprops of three samples; the second is the record, the others have zero gradients."""
    case = module.case
    if case.element == ():
        x = torch.full((3, case.uses), 7)
    else:
        x = torch.rand(1, 1, *case.element, dtype=dtype).expand(3, case.uses, *case.element) + 0.1
        is_norm = "norm" in type(module.layers[0]).__name__.lower()
        x = x * (1.0 if is_norm else scale)
    with torch.no_grad():
        shape = module(x).shape
    steps = coefficients(case.uses).to(dtype)
    steps[steps.abs().argmax()] *= 1 + nearly * torch.finfo(dtype).eps
    backprop = torch.rand(1, 1, *shape[2:], dtype=dtype) + 0.1
    if case.element == () or x.abs().max() < 10 * scale:
        backprop = backprop * scale
    backprop = backprop * steps.view(1, -1, *[1] * (len(shape) - 2))
    return x, torch.cat([torch.zeros_like(backprop), backprop, torch.zeros_like(backprop)])


def masks_of(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """No mask, one that keeps half of the coordinates, and one that keeps few."""
    yield {}
    for share in (0.6, 0.2):
        yield {name: torch.rand(p.shape) < share for name, p in module.named_parameters()}


def added(
    engine: PerSampleEngine | SingleSampleEngine, module: nn.Module, clipping: Clipping, mask: dict[str, Tensor]
) -> float:
    """Norm of what the microbatch adds to the buffer, as a private step adds it."""
    sums = Accumulator(dict(module.named_parameters()), clipping)
    sums.set_masks([mask] if mask else [], (len(mask),))
    clipping.contribution(Samples(engine, sums, 1.0, Reduction())).add()
    total = sums.flat.double()
    assert bool(total.isfinite().all())
    return float(total.norm()) / sums.sensitivity


@pytest.mark.parametrize(("name", "how", "way"), [each for each in ARRANGED if not each.marks])
def test_cancelling_records_keep_to_the_bound(name: str, how: str, way: dict[str, str]) -> None:
    """A third of the sizes; between its arrangements a case meets all."""
    check_cancelling(name, how, way, share=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "way"), ARRANGED)
def test_cancelling_records_of_any_size_keep_to_the_bound(name: str, how: str, way: dict[str, str]) -> None:
    """Between the arrangements and memory settings of a case, every clipping meets every size."""
    check_cancelling(name, how, way, share=1)


def check_cancelling(name: str, how: str, way: dict[str, str], share: int) -> None:
    """Two clippings and a mask in turn at each size."""
    turn, first = HOWS.index(how) + WAYS.index(way), HOWS.index(how)
    for dtype, all_sizes in SIZES.items():
        sizes = [(number, *size) for number, size in enumerate(all_sizes) if number % share == turn % share]
        if not sizes:
            continue
        module = Arranged(CASES[name], how).to(dtype)
        masks = list(masks_of(module))

        def loss(batch: tuple[Tensor, Tensor], module: nn.Module = module) -> Tensor:
            return (module(batch[0]) * batch[1]).flatten(1).sum(1)

        x, backprop = record(module, 1.0, 0.0, dtype)
        like = torch.rand_like(x) if x.is_floating_point() else torch.randint_like(x, 9)
        engine = make_engine(module, loss, (like, backprop), **way)
        for number, scale, nearly in sizes:
            x, backprop = record(module, scale, nearly, dtype)
            rows = slice(1, 2) if (first + number) % 2 else slice(0, 3)  # alone, or with others
            run_batch(engine, loss, (x[rows], backprop[rows]), len(x[rows]))
            chosen = [CLIPPINGS[(first + number + more) % len(CLIPPINGS)] for more in (0, 2)]
            for clipping, mask in [
                *((one, masks[0]) for one in chosen),
                (CLIPPINGS[1], masks[1 + (turn + number) % 2]),
            ]:
                excess = added(engine, module, clipping, mask)
                assert excess <= 1 + 1e-5, (dtype, scale, nearly, clipping, bool(mask))
            engine.end()


@pytest.mark.parametrize("engine_class", [PerSampleEngine, SingleSampleEngine])
@pytest.mark.parametrize(
    "name", ["linear, products", "conv3d", "embedding", "layer norm", "elementwise", "weight norm"]
)
def test_cancelling_backwards_keep_to_the_bound(name: str, engine_class: type) -> None:
    """Each use of the parameters has a backward of its own."""
    module = Arranged(CASES[name], "calls")
    x, backprop = record(module, 1e9, 5, torch.float32)
    like = torch.rand_like(x) if x.is_floating_point() else torch.randint_like(x, 9)
    engine = make_engine(module, lambda batch: (module(batch[0]) * batch[1]).flatten(1).sum(1), (like, backprop))
    if engine_class is SingleSampleEngine:
        engine.detach()
        engine = SingleSampleEngine(module)
        engine.attach()
        engine.set_parameters(dict(module.named_parameters()))
    engine.begin(1)
    for use in range(module.case.uses):
        (module.layers[0](x[1:2, use]) * backprop[1:2, use]).sum().backward()
    engine.check_tracked()
    for clipping in CLIPPINGS:
        assert added(engine, module, clipping, {}) <= 1 + 1e-5, clipping


@pytest.mark.parametrize(("name", "how", "way"), ARRANGED)
@pytest.mark.one_in(2)
def test_ordinary_norms_change_by_rounding_only(name: str, how: str, way: dict[str, str]) -> None:
    """What is added for rounding stays below 2e-5 of a norm without cancellation."""
    module = Arranged(CASES[name], how)
    exact = copy.deepcopy(module).double()
    element, uses = module.case.element, module.case.uses
    x = torch.randn(4, uses, *element) if element else torch.randint(0, 9, (4, uses))
    backprop = torch.randn_like(module(x))
    engine = make_engine(module, lambda batch: (module(batch[0]) * batch[1]).flatten(1).sum(1), (x, backprop), **way)
    run_batch(engine, lambda batch: (module(batch[0]) * batch[1]).flatten(1).sum(1), (x, backprop), 4)
    names = [one for one, _ in module.named_parameters()]
    wide = x.double() if element else x
    grads = reference.per_sample_gradients(exact, lambda i: (exact(wide[i : i + 1]) * backprop[i].double()).sum(), 4)
    change = engine.squared_norms([names]).sqrt().double() / reference.squared_norms(grads, [names]).sqrt() - 1
    assert bool((change >= -1e-6).all())
    assert bool((change <= 2e-5).all())


def test_every_registered_rule_has_a_case() -> None:
    covered = set()
    for case in CASES.values():
        module = Arranged(case, "positions")
        x = torch.randn(4, case.uses, *case.element) if case.element else torch.randint(0, 9, (4, case.uses))
        engine = make_engine(module, lambda batch, module=module: module(batch).flatten(1).sum(1), x)
        run_batch(engine, lambda batch, module=module: module(batch).flatten(1).sum(1), x, 4)
        covered |= {type(source.rule) for source in engine._tracker.sources.values()}
    assert covered == {*rules.registered(), LeafRule}
    # those of single operations are in test_custom and test_replaying
    kinds = {kind for kind in _kinds_of(Rule) if not kind.__name__.startswith("_")}
    assert covered == {kind for kind in kinds if not issubclass(kind, Registered)}


def _kinds_of(kind: type) -> set[type]:
    """Every class below one, in this package."""
    below = {one for child in kind.__subclasses__() for one in (child, *_kinds_of(child))}  # type: ignore[var-annotated]
    return {one for one in below if one.__module__.startswith("lightning_dp.")}


def test_every_clipping_by_factor_is_tried() -> None:
    kinds = {getattr(clippings, name) for name in clippings.__all__}
    kinds = {kind for kind in kinds if isinstance(kind, type) and not inspect.isabstract(kind) and kind.bounded}
    assert {type(one) for one in CLIPPINGS} == {kind for kind in kinds if issubclass(kind, FactorClipping)}
