"""Users as samples: the engine's gradient of a user is the sum of those of its records, for every rule and
arrangement.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample import SingleSampleEngine
from lightning_dp.per_sample.joining import Joining
from tests import reference
from tests.helpers import Largest
from tests.per_sample.checks import assert_close, make_engine, stack
from tests.per_sample.rule_cases import CASES, HOWS, Arranged
from tests.per_sample.test_custom import DATA, Net

UNEVEN, EVEN = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2])


def data_of(name: str) -> Tensor:
    case = CASES[name]
    if name.startswith("embedding"):
        return torch.randint(11, (len(UNEVEN), case.uses))
    return torch.randn(len(UNEVEN), case.uses, *case.element, dtype=torch.float64)


def assert_users_agree(module: nn.Module, loss: Any, data: Tensor, owners: Tensor, **options: Any) -> None:
    """Norms, sums and gradients, also under a mask, are those of the sums of single gradients over a user's records."""
    size, users = len(owners), int(owners.max()) + 1
    singles = reference.per_sample_gradients(module, lambda i: loss(stack(data, [i])).sum(), size)
    expected = {n: g.new_zeros(users, *g.shape[1:]).index_add(0, owners, g) for n, g in singles.items()}
    engine = make_engine(module, loss, data, **options)
    names, factors = list(expected), torch.linspace(0.0, 1.0, users, dtype=torch.float64)
    masks = {n: torch.rand(g.shape[1:], generator=torch.Generator().manual_seed(7)) < 0.5 for n, g in expected.items()}
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for mask in (None, masks):
        engine.begin(size, owners)
        loss(data).sum().backward()
        engine.check_tracked()
        kept = {n: g if mask is None else g * mask[n] for n, g in expected.items()}
        parts = None if mask is None else {n: ParameterMask(m) for n, m in mask.items()}
        true = reference.squared_norms(kept, [names])
        assert_close(engine.squared_norms([names], parts), true, float(true.max()), 1e-9, "norms")
        out = {n: torch.zeros_like(grad[0] if mask is None else grad[0][mask[n]]) for n, grad in kept.items()}
        engine.accumulate(factors[None], [names], out, parts)
        for name, total in reference.weighted_sum(kept, factors).items():
            assert_close(out[name], total if mask is None else total[mask[name]], scale, 1e-9, name)
        for name, grad in engine.per_sample_gradients(names).items():
            assert_close(grad, expected[name], scale, 1e-9, name)
        engine.end()
    engine.detach()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(4)
def test_joined_records_add_up_under_every_rule(name: str, how: str) -> None:
    torch.manual_seed(0)
    module = Arranged(CASES[name], how).double()
    data = data_of(name)
    assert_users_agree(module, lambda x: module(x).square().flatten(1).sum(1), data, UNEVEN)


@pytest.mark.parametrize("options", [{}, {"memory": "lean"}, {"grad_sample": "materialize"}], ids=str)
def test_joined_records_add_up_in_every_setting(options: Any) -> None:
    torch.manual_seed(0)
    for name in ("linear, Gram matrices", "conv2d, Gram matrices", "elementwise", "embedding"):
        module = Arranged(CASES[name], "positions").double()
        for owners in (UNEVEN, EVEN):
            assert_users_agree(module, lambda x: module(x).square().flatten(1).sum(1), data_of(name), owners, **options)  # noqa: B023


@pytest.mark.parametrize("how", ["batch first", "folded"])
def test_joined_records_add_up_under_a_registered_rule(how: str) -> None:
    from tests.per_sample.test_custom import Affine, gradients, register_rule

    torch.manual_seed(0)
    remove = register_rule(Affine, gradients, arguments=("x", "weight", "bias", "scale"), parameters=("weight", "bias"))
    try:
        module = Net(how)
        assert_users_agree(module, lambda x: module(x).square().flatten(1).sum(1), DATA, UNEVEN)
    finally:
        remove()


def test_one_record_a_user_changes_no_bit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(2), nn.Linear(10, 3))
    data = torch.randn(5, 2, 12)
    engine = make_engine(module, lambda x: module(x).square().flatten(1).sum(1), data)
    names, found = [name for name, _ in module.named_parameters()], []
    for owners in (None, torch.arange(5)):
        engine.begin(5, owners)
        module(data).square().sum().backward()
        out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        norms = engine.squared_norms([names])
        engine.accumulate(1 / norms.sqrt(), [names], out)
        found.append([norms, *out.values()])
        engine.end()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_user_that_is_not_finite_reaches_no_other_user() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    data = torch.randn(6, 3)
    engine = make_engine(module, lambda x: module(x).square().sum(1), data)
    names = [name for name, _ in module.named_parameters()]
    clean = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    run = data.clone()
    run[0] = torch.nan  # of user 0; users 0 and 1 have fewer records than user 2 and are filled up
    for given, out in ((run, {n: torch.zeros_like(t) for n, t in clean.items()}), (data, clean)):
        engine.begin(6, UNEVEN)
        module(given).square().sum().backward()
        norms = engine.squared_norms([names])
        assert norms.isfinite()[0].tolist() == [given is data, True, True]
        engine.accumulate(torch.tensor([[0.0, 1.0, 1.0]]), [names], out)
        engine.end()
        if out is not clean:
            first = out
    for name in names:
        torch.testing.assert_close(first[name], clean[name])


def test_no_gradient_of_a_record_is_made_where_gram_matrices_do() -> None:
    """2 users of 3 records at 4 positions and a layer of 300 x 300: nothing as large as one gradient is made for the
    norms.
    """
    torch.manual_seed(0)
    module = nn.Linear(300, 300)
    data = torch.randn(6, 4, 300)
    engine = make_engine(module, lambda x: module(x).square().flatten(1).sum(1), data, memory="lean")
    engine.begin(6, torch.tensor([0, 0, 0, 1, 1, 1]))
    module(data).square().sum().backward()
    with Largest() as largest:
        engine.squared_norms([["weight"]])
    assert 0 < largest.elements < 300 * 300
    engine.end()


def test_single_engine_takes_the_records_of_one_user() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    data = torch.randn(4, 3, dtype=torch.float64)
    engine = SingleSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    engine.begin(4, torch.zeros(4, dtype=torch.int64))
    module(data).square().sum().backward()
    expected = reference.gradient_of(module, module(data).square().sum())
    torch.testing.assert_close(engine.per_sample_gradients()["weight"][0], expected["weight"])
    with pytest.raises(ValueError, match="Expected at most one sample"):
        engine.begin(4, torch.tensor([0, 0, 0, 1]))
    engine.detach()


@pytest.mark.parametrize("owners", [[0, 2], [1, 1], [0, 1, 0]])
def test_owners_with_a_gap_are_refused(owners: list[int]) -> None:
    with pytest.raises(ValueError, match="Expected ascending owners"):
        Joining(torch.tensor(owners))
