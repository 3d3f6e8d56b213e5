"""Microbatches of one sample: any module, and no raw gradient where a user could see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample import SingleSampleEngine
from tests import reference
from tests.per_sample.checks import assert_close, parameter_masks


class Anything(nn.Module):
    """What the other engine refuses: a recurrent layer, BatchNorm, a weight penalty, functional use, a sparse table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, sparse=True)
        self.rnn = nn.LSTM(3, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.gain = nn.Parameter(torch.rand(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rnn(self.table(x))[0].flatten(0, 1)
        return (self.norm(hidden) * self.gain).square().sum() + self.gain.square().sum()


class Dense(Anything):
    def __init__(self, other: Anything) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3).double()
        self.load_state_dict(other.state_dict())


def _engine(module: nn.Module) -> SingleSampleEngine:
    engine = SingleSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    engine.learn_layout(lambda size: None)
    return engine


def test_single_agrees_with_plain_autograd_for_any_module() -> None:
    torch.manual_seed(0)
    module = Anything()
    x = torch.randint(0, 5, (1, 6))
    dense = Dense(module)
    expected = reference.per_sample_gradients(dense, lambda i: dense(x), 1)
    names = list(expected)
    engine = _engine(module)
    masks = {name: torch.rand(g.shape[1:]) < 0.5 for name, g in expected.items()}
    groups = [names, ["gain"], []]
    for _ in range(2):
        engine.begin(1)
        module(x).backward()
        assert all(p.grad is None for p in module.parameters())
        engine.check_tracked()
        grads = engine.per_sample_gradients()
        for mask in (None, masks):
            chosen = None if mask is None else parameter_masks(mask)
            true = reference.squared_norms(expected, groups, mask)
            assert_close(engine.squared_norms(groups, chosen), true, 1.0, 1e-9, "norms")
            active = {n: g[0] if mask is None else g[0][mask[n]] for n, g in expected.items()}
            out = {name: torch.zeros_like(values) for name, values in active.items()}
            engine.accumulate(torch.tensor([[0.5]]), [names], out, chosen)
            for name in names:
                assert_close(out[name], 0.5 * active[name], 1.0, 1e-9, name)
                assert_close(grads[name], expected[name], 1.0, 1e-9, name)
        engine.end()


def test_single_leaves_no_raw_gradient_and_restores_the_old() -> None:
    module = nn.Linear(2, 1)
    engine = _engine(module)
    old = torch.ones_like(module.weight)
    module.weight.grad = old
    engine.begin(1)
    module(torch.randn(1, 2)).sum().backward()
    assert module.weight.grad is None
    engine.end()
    assert module.weight.grad is old
    assert torch.equal(old, torch.ones_like(old))
    module(torch.randn(1, 2)).sum().backward()
    assert not torch.equal(module.weight.grad, torch.ones_like(old))
    engine.detach()
    assert not module.weight._post_accumulate_grad_hooks


def test_single_adds_backwards_and_discards() -> None:
    module = nn.Linear(2, 1)
    engine = _engine(module)
    engine.begin(1)
    x = torch.tensor([[1.0, 2.0]])
    for _ in range(3):
        module(x).sum().backward()
    assert torch.equal(engine.per_sample_gradients()["weight"], 3 * x[None])
    engine.discard(["weight"])
    assert engine.has_backprops(["bias"])
    assert not engine.has_backprops(["weight"])
    module(x).sum().backward()
    assert torch.equal(engine.per_sample_gradients()["weight"], x[None])
    assert engine.per_sample_gradients()["bias"].item() == 4.0
    engine.discard()
    assert not engine.squared_norms([["weight", "bias"]]).any()


@pytest.mark.parametrize("size", [4096, 4097, 2**24])
def test_single_norm_of_equal_entries_is_exact_to_float32(size: int) -> None:
    """One after the other, sixteen million squares of 1 / sqrt(3) add up to 0.7 % less."""
    module = nn.ParameterDict({"long": torch.zeros(size), "short": torch.zeros(3), "wide": torch.zeros(2).double()})
    engine = _engine(module)
    engine.begin(1)
    (sum(module[name].sum() for name in ("long", "short", "wide")) * 3**-0.5).backward()
    names = [["long", "short"], ["short", "wide"]]
    expected = torch.tensor([size / 3 + 1, 5 / 3]).double()
    torch.testing.assert_close(engine.squared_norms(names)[:, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_single_factor_zero_is_exactly_zero(bad: float) -> None:
    module = nn.Linear(2, 1)
    engine = _engine(module)
    engine.begin(1)
    module(torch.full((1, 2), bad)).sum().backward()
    assert not engine.squared_norms([["weight"]]).isfinite().any()
    out = {"weight": torch.ones(1, 2)}
    engine.accumulate(torch.zeros(1, 1), [["weight"]], out)
    assert torch.equal(out["weight"], torch.ones(1, 2))


def test_single_takes_an_empty_batch() -> None:
    module = nn.Linear(2, 1)
    engine = _engine(module)
    engine.begin(0)
    module(torch.zeros(1, 2)).sum().backward()
    out = {"weight": torch.zeros(1, 2)}
    assert engine.squared_norms([["weight"]]).shape == (1, 0)
    engine.accumulate(torch.zeros(1, 0), [["weight"]], out)
    assert engine.per_sample_gradients()["weight"].shape == (0, 1, 2)
    assert not out["weight"].any()
    assert module.weight.grad is None


@pytest.mark.parametrize("size", [2, -1])
def test_single_refuses_larger_microbatches(size: int) -> None:
    with pytest.raises(ValueError, match="at most one sample"):
        _engine(nn.Linear(1, 1)).begin(size)
