"""Batch axes are learned from two sizes, never guessed from one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.layout import BatchAxis
from tests import reference
from tests.per_sample.checks import assert_close, assert_engine_agrees, make_engine, run_batch


def _loss(module: nn.Module):
    return lambda x: module(x).square().flatten(1).sum(1)


def _data(*shape: int) -> Tensor:
    return torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Folded(nn.Module):
    """One layer that sees its samples in many ways; always returns ``(B, T, 2)``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        if self.how == "batch second":
            return self.head(self.norm(self.layer(x.transpose(0, 1)).tanh())).transpose(0, 1)
        if self.how == "batch third":
            return self.head(self.norm(self.layer(x.transpose(0, 1)[None]).tanh()))[0].transpose(0, 1)
        if self.how == "time folded":
            return self.head(self.norm(self.layer(x.reshape(-1, 3)).tanh())).view(batch, time, 2)
        if self.how == "time folded outside":
            hidden = x.transpose(0, 1).reshape(-1, 3)
            return self.head(self.norm(self.layer(hidden).tanh())).view(time, batch, 2).transpose(0, 1)
        if self.how == "views":
            hidden = self.layer(torch.cat([x, x * 2, -x]).tanh())
            return sum(self.head(self.norm(hidden)).chunk(3)).tanh()
        if self.how == "recurrent":
            state = x.new_zeros(batch, 4)
            states = []
            for step in x.unbind(1):
                state = self.norm(self.layer(step) + state).tanh()
                states.append(self.head(state))
            return torch.stack(states, 1)
        if self.how == "differing calls":
            first = self.layer(x).mean(1)
            second = self.layer(x.transpose(0, 1)).mean(0)
            third = self.layer(x.reshape(-1, 3)).view(batch, time, 4).mean(1)
            return self.head(self.norm(first.sin() * second.cos() + third)).unsqueeze(1)
        raise AssertionError(self.how)


HOWS = ["batch second", "batch third", "time folded", "time folded outside", "views", "recurrent", "differing calls"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("size", [0, 1, 2, 4, 6])
@pytest.mark.one_in(2)
def test_layouts_agree_with_batches_of_one(how: str, size: int) -> None:
    """Four time steps: also with as many samples as time steps."""
    torch.manual_seed(0)
    module = Folded(how)
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=size)


@pytest.mark.parametrize("how", ["time folded", "time folded outside", "recurrent", "batch second"])
def test_lengths_may_differ_from_the_learned_ones(how: str) -> None:
    torch.manual_seed(0)
    module = Folded(how)
    expected = reference.per_sample_gradients(module, lambda i: _loss(module)(_data(7, 3)[i : i + 1]).sum(), 5)
    engine = make_engine(module, _loss(module), _data(4, 3))
    run_batch(engine, _loss(module), _data(7, 3), 5)
    for name, grad in engine.per_sample_gradients().items():
        assert_close(grad, expected[name], float(grad.abs().max()), 1e-9, name)


class Unclear(nn.Module):
    """Calls whose samples cannot be distinguished."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "two axes":
            return self.layer((x @ x.T).unsqueeze(2))
        if self.how == "extra row":
            return self.layer(torch.cat([x, x[:1]]))
        if self.how == "calls":
            return torch.stack([self.layer(row) for row in x])
        if self.how == "rank":
            return self.layer(x if x.shape[0] == 2 else x[None])
        if self.how == "pooled":
            return self.layer(x.mean(0))
        if self.how == "random rows":
            return self.layer(torch.cat([x, x]) + torch.rand(2 * len(x), 3))
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("two axes", "two axes change"),
        ("extra row", "no multiple of the batch size"),
        ("calls", "called 2 times with 2 samples and 5 times with 5"),
        ("rank", "its shape goes from"),
        ("random rows", "which rows belong to which sample"),
        ("pooled", "without a batch axis"),
    ],
)
def test_unclear_layouts_are_refused(how: str, match: str) -> None:
    module = nn.Sequential(Unclear(how)) if how == "pooled" else Unclear(how)
    module(torch.randn(2, 3))
    engine = PerSampleEngine(module)
    engine.set_parameters(dict(module.named_parameters()))
    data = torch.randn(2, 3).repeat(3, 1)
    way_out = ".*negatives of its own" if how == "two axes" else ".*grad_sample='single'"
    with pytest.raises(PrivacyError, match="(?s)" + match + way_out) as caught:
        engine.learn_layout(lambda size: module(data[:size]))
    assert ("single" in str(caught.value)) == (how != "two axes")


def test_unclear_layouts_of_frozen_modules_do_not_matter() -> None:
    module = nn.ModuleDict({"odd": Unclear("extra row"), "even": nn.Linear(3, 2)})
    module["odd"](torch.randn(2, 3))
    engine = PerSampleEngine(module)
    engine.set_parameters({f"even.{n}": p for n, p in module["even"].named_parameters()})
    data = torch.randn(2, 3).repeat(3, 1)
    engine.learn_layout(lambda size: module["even"](data[:size]) + module["odd"](data[:size])[:-1])
    assert engine.has_layout


@pytest.mark.parametrize("rows", [7, 8, 0])
def test_rows_that_do_not_divide_among_samples_are_refused(rows: int) -> None:
    module = nn.Linear(3, 2)
    engine = make_engine(module, lambda x: module(x).sum(1), torch.randn(6, 3))
    engine.begin(4)
    with pytest.raises(PrivacyError, match=r"hold 1 row\(s\) for each of 4 samples"):
        module(torch.randn(rows, 3)).sum().backward()


def test_a_layer_first_used_later_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.second = nn.Linear(3, 2), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            return self.two(x) if self.second else self.one(x)

    module = Branch()
    engine = make_engine(module, lambda x: module(x).sum(1), torch.randn(6, 3))
    module.second = True
    with pytest.raises(PrivacyError, match=r"'two\.weight'.*first call later"):
        run_batch(engine, lambda x: module(x).sum(1), torch.randn(6, 3), 4)


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (3,), (0, 2)])
def test_learning_needs_two_different_sizes(sizes: tuple[int, ...]) -> None:
    engine = PerSampleEngine(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="two different sizes"):
        engine.learn_layout(lambda size: None, sizes=sizes)


def test_learning_leaves_gradients_and_module_alone() -> None:
    module = nn.Linear(3, 2)
    old = torch.ones(2, 3)
    module.weight.grad = old

    def run(size: int) -> None:
        module.zero_grad()
        module(torch.randn(size, 3)).sum().backward()

    engine = PerSampleEngine(module)
    engine.set_parameters(dict(module.named_parameters()))
    engine.learn_layout(run)
    assert module.weight.grad is old
    assert module.bias.grad is None
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_failing_run_is_the_users_error_and_leaves_no_hooks() -> None:
    module = nn.Linear(3, 2)
    engine = PerSampleEngine(module)
    engine.set_parameters(dict(module.named_parameters()))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine.learn_layout(lambda size: module(torch.randn(size, 4)))
    assert not module._forward_hooks
    assert not engine.has_layout


def test_rows_are_put_sample_major() -> None:
    rows = torch.tensor([[0, 10], [1, 11], [2, 12]]).T.reshape(-1)  # sample s, view v -> 10 v + s; view-major
    front, multiplicity = BatchAxis(0, 2, sample_major=False).to_front(rows, 3, "here")
    assert multiplicity == 2
    assert front.tolist() == [0, 10, 1, 11, 2, 12]
    front, _ = BatchAxis(1, 2, sample_major=True).to_front(torch.arange(12).view(2, 6), 3, "here")
    assert front.shape == (6, 2)
    assert front[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


class MoreUses(nn.Module):
    """A layer that sees its samples along two axes, and once more from some step on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False).double()
        self.shape: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        shapes = [(-1, 3), (1, -1, 3)] + ([] if self.shape is None else [self.shape])
        return torch.stack([self.layer(x.view(shape)).view(-1, 2) for shape in shapes], 1)


@pytest.mark.parametrize(("shape", "size"), [((-1, 3), 4), ((1, 1, -1, 3), 4), ((-1, 3), 3)])
def test_a_further_use_has_the_one_layout_that_fits(shape: tuple[int, ...], size: int) -> None:
    """A shape that was never seen fits none, and of three columns for three samples each of the two might be right."""
    module, x = MoreUses(), _data(3)
    engine = make_engine(module, _loss(module), x)
    module.shape = shape
    if len(shape) > 3 or size == 3:
        with pytest.raises(PrivacyError, match=r"got tensors of shapes .* unlike those of 2 uses seen\."):
            run_batch(engine, _loss(module), x, size)
        return
    run_batch(engine, _loss(module), x, size)
    found = engine.per_sample_gradients()["layer.weight"]
    engine.end()
    engine.detach()
    for row, gradient in zip(x.split(1), found, strict=False):
        torch.testing.assert_close(gradient, torch.autograd.grad(_loss(module)(row).sum(), module.layer.weight)[0])
