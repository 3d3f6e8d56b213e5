"""Parameters used by functions of autograd, masks, scripts and compiled layers, and what is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.rules.conv import ConvRule
from tests.helpers import Hidden
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch
from tests.per_sample.ways_of_use import Uses, _data, _loss, drawn


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


class Rounded(torch.autograd.Function):
    """A gradient that passes straight through, twice as large; to a step size, one of its own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor) -> Tensor:
        return (weight / step).round().clamp(-3, 3) * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0], 3 * grads[0].sum().reshape(1)


round_by = Rounded.apply


class Sparse(torch.autograd.Function):
    """A threshold from sorted logits, with indices and constants on the way, as sparsemax has it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, shift: Tensor, dim: int) -> Tensor:
        top, at = logits.max(dim, keepdim=True)
        logits = logits - top + shift[at.clamp_max(0)]
        ordered = torch.sort(logits, dim=dim, descending=True)[0]
        rho = torch.arange(1, logits.shape[dim] + 1).view(1, -1)
        size = (rho * ordered > ordered.cumsum(dim) - 1).sum(dim, keepdim=True)
        tau = ((ordered.cumsum(dim) - 1) / rho).gather(dim, size - 1)
        out = torch.clamp(logits - tau, min=0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inside = ctx.saved_tensors[0] > 0
        return grads[0] * inside, 0.5 * (grads[0] * inside).sum().reshape(1), None


def normed(m: Any, x: Tensor) -> Tensor:
    """Spectral norm: its power iteration runs without gradient on the weight that it then divides."""
    weight = m.w.flatten(1)
    with torch.no_grad():
        v = torch.nn.functional.normalize(weight.t() @ torch.ones(3, dtype=weight.dtype), dim=0)
        u = torch.nn.functional.normalize(weight @ v, dim=0).clone()
    return x @ (m.w / torch.dot(u, weight @ v.clone()))


BY_OWN_CODE: dict[str, Any] = {
    "of a parameter": lambda m, x: x @ Rounded.apply(m.w, m.s),
    "of functions": lambda m, x: x @ (Rounded.apply(m.w / m.s, m.s.exp()) * m.s),
    "by indices and constants": lambda m, x: x @ Sparse.apply(m.w, m.s, -1),
    "bound early": lambda m, x: (x @ round_by(m.w, m.s)).tanh() @ round_by(m.w, m.s).t(),
    "without gradient": normed,
}


@pytest.mark.parametrize("name", BY_OWN_CODE)
def test_functions_of_autograd_on_parameters_alone_are_followed(name: str) -> None:
    module = Uses(BY_OWN_CODE[name], w=drawn(3, 2), s=torch.tensor([0.4]))
    assert_engine_agrees(module, _loss(module), _data(4, 3), names=["w"] if name == "without gradient" else None)


def _scattered(m: Any, x: Tensor, mask: list[Any]) -> Tensor:
    weight = torch.zeros(torch.tensor(mask).shape + m.w.shape[1:], dtype=torch.float64)
    weight[torch.tensor(mask)] = m.w
    return x @ weight.t()


@pytest.mark.parametrize(
    ("weight", "mask"),
    [
        (drawn(3, 2), [True, False, True, True, False]),
        (drawn(2), [[False, True], [True, False], [False, False]]),
        (drawn(1, 2), [True, False, True]),
        (drawn(2, 2), [True, True]),
    ],
)
def test_a_mask_takes_one_row_for_each_true_entry(weight: Tensor, mask: list[Any]) -> None:
    module = Uses(lambda m, x: _scattered(m, x, mask) + x @ m.v, w=weight, v=drawn(2, 1))
    assert_engine_agrees(module, _loss(module), _data(4, 2))


def test_an_empty_mask_writes_nothing() -> None:
    module = Uses(lambda m, x: _scattered(m, x, [False, False]) + x @ m.v, w=drawn(3, 2)[:0], v=drawn(2, 1))
    assert_engine_agrees(module, _loss(module), _data(4, 2), names=["v"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("derived", [False, True])
def test_uses_that_do_not_report_themselves_are_found(scripted: bool, derived: bool) -> None:
    """Of a parameter and of a function of it: no raw gradient stays, and the parameter is named."""
    function = torch.jit.script(_product) if scripted else Hidden.apply
    module = Uses(
        lambda m, x: m.layer(x) + function(x, 2 * m.w if derived else m.w), w=drawn(3, 2), layer=nn.Linear(3, 2)
    )
    engine = make_engine(module, _loss(module), _data(4, 3))
    cause = "a torch.autograd.Function, a scripted" if scripted else "the torch.autograd.Function Hidden, which hides"
    with pytest.raises(PrivacyError, match=rf"\['w'\]: {cause}.*grad_sample='single'"):
        run_batch(engine, _loss(module), _data(4, 3), 4)
    assert module.w.grad is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
def test_a_scripted_layer_is_found() -> None:
    module = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 2)).double()
    engine = make_engine(module, _loss(module), _data(3))
    with pytest.raises(PrivacyError, match=r"\['0.bias', '0.weight'\]: the scripted or traced '0', which hides"):
        run_batch(engine, _loss(module), _data(3), 4)


def test_a_compiled_layer_reports_itself() -> None:
    """It runs as it was before it was compiled, and is compiled again afterwards."""
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        runs.append(1)
        return graph

    module = nn.Sequential(torch.compile(nn.Linear(3, 3), backend=backend), nn.Tanh(), nn.Linear(3, 2)).double()  # type: ignore[call-overload]
    assert_engine_agrees(module, _loss(module), _data(3))
    assert not runs or module(_data(3)) is not None


@pytest.mark.parametrize("how", ["penalty", "pooled", "statistic"])
def test_parameters_that_meet_no_samples_are_refused(how: str) -> None:
    layer = nn.Linear(3, 2).double()

    def loss(x: Tensor) -> Tensor:
        if how == "penalty":
            return layer(x).sum() + layer.weight.square().sum()
        if how == "pooled":
            return layer(x).sum(1) + layer(x.mean(0)).sum()
        return layer(x).sum(1) + (layer(x).mean(0) * layer.bias).sum()

    match = {
        "penalty": r"'sum\(square\(weight\)\)' to meet tensors with a batch axis.*weight_decay",
        "pooled": r"linear of 'weight', 'bias'.*without a batch axis whose values change with.*samples are mixed",
        "statistic": r"mul of 'bias'.*without a batch axis.*a statistic of the batch mixes its samples",
    }[how]
    with pytest.raises(PrivacyError, match=match):
        make_engine(layer, loss, _data(3))


def test_a_function_of_an_earlier_batch_is_refused() -> None:
    module = Uses(lambda m, x: x * (m.w.exp() if m.kept is None else m.kept), w=drawn(3))
    module.kept = None
    engine = make_engine(module, _loss(module), _data(3))
    engine.begin(4)
    kept = module.w.exp()
    engine.begin(4)
    module.kept = kept
    with pytest.raises(PrivacyError, match=r"'exp\(w\)' of an earlier one"):
        module(_data(3)[:4])


def test_state_that_moves_with_every_forward_is_a_constant() -> None:
    """As the vectors of spectral norm: they differ from run to run at the same batch size too."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        m.state += 1.0
        return x * (m.w * m.state)

    module = Uses(scaled, w=drawn(3))
    module.state = torch.zeros(3, dtype=torch.float64)
    make_engine(module, _loss(module), _data(3))


def test_parameters_look_like_parameters_in_a_step() -> None:
    module = nn.Linear(3, 2).double()
    average, seen = torch.zeros(2, 3, dtype=torch.float64), []

    def loss(x: Tensor) -> Tensor:
        weight = module.weight
        with torch.no_grad():
            average.mul_(0.5).add_(weight, alpha=0.5)
            plain = weight * 1.0
        seen.append(
            (isinstance(weight, nn.Parameter), weight.requires_grad, weight.is_leaf, type(plain), type(weight.detach()))
        )
        state = copy.deepcopy(module.state_dict())
        assert all(type(value) is Tensor for value in state.values())
        assert type(copy.deepcopy(module).weight) is nn.Parameter
        assert weight is dict(module.named_parameters())["weight"]
        return module(x).sum(1)

    engine = make_engine(module, loss, _data(3))
    seen.clear()
    run_batch(engine, loss, _data(3), 4)
    assert seen == [(True, True, True, Tensor, Tensor)]
    assert type(average) is Tensor
    engine.end()
    assert type(module.weight) is nn.Parameter


def test_parameters_of_one_function_train_together() -> None:
    """Their gradients come from one computation, which cannot be forgotten in part."""
    module = Uses(lambda m, x: F.linear(x, m.b @ m.a), a=drawn(2, 3), b=drawn(4, 2))
    engine = make_engine(module, _loss(module), _data(3))
    run_batch(engine, _loss(module), _data(3), 4)
    with pytest.raises(PrivacyError, match="in one optimizer"):
        engine.discard(["a"])
    engine.discard(["a", "b"])
    assert not engine.has_backprops(["a", "b"])


@pytest.mark.parametrize(("equation", "operands"), [("bti,io->tio", 1), ("bti,io,ctj->b", 2)])
@pytest.mark.parametrize("zero", [False, True])
def test_a_product_over_the_samples_is_named(equation: str, operands: int, zero: bool) -> None:
    """It is found at the first use, before a step has moved a weight from zero."""
    weight = torch.zeros(3, 3, dtype=torch.float64) if zero else drawn(3, 3)
    mixing = Uses(lambda m, x: torch.einsum(equation, x, m.w, *[x] * (operands - 1)), w=weight)
    engine = make_engine(mixing, lambda x: mixing(x).sum(), _data(4, 3))
    with pytest.raises(PrivacyError, match=r"einsum of 'w' to keep the samples apart"):
        run_batch(engine, lambda x: mixing(x).sum(), _data(4, 3), 4)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_rows_that_differ_by_sample_are_no_copies(value: float) -> None:
    """A table of positions that is indexed by samples, by mistake: its rows are equal before the first step only."""
    module = Uses(lambda m, x: x + m.w[: len(x)], w=torch.full((9, 1, 3), value, dtype=torch.float64))
    with pytest.raises(PrivacyError, match=r"__getitem__ of 'w' works on, but its result is not the same for every"):
        make_engine(module, _loss(module), _data(4, 3))


def test_an_operation_in_place_is_tried_on_copies() -> None:
    """The first use is compared with the operation itself; the user's tensor is written to once."""
    module = Uses(lambda m, x: (x[:, 0] * 1.0).addmv_(x, m.w).tanh(), w=drawn(3))
    assert_engine_agrees(module, lambda x: module(x).square(), _data(3))


def test_the_convolution_rule_needs_the_samples_first() -> None:
    """Samples along the channels would be convolved over."""
    module = Uses(
        lambda m, x: F.conv1d(x.transpose(0, 1), m.w.expand(len(x), 1, 1), groups=len(x)).transpose(0, 1),
        w=drawn(1, 1, 1),
    )
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)  # a weight for each sample
    spec = nn.Conv1d(1, 1, 1)
    assert ConvRule().follows(spec, 0, 3)
    assert not ConvRule().follows(spec, 1, 3)
    assert not ConvRule().follows(spec, 0, 2)  # the channels of one sample


def test_long_chains_of_functions_have_short_names() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            for _ in range(100):
                weight = weight.sin() + 0.1
            return F.linear(x, weight)

    module, data = Chain(), torch.randn(5, 3, dtype=torch.float64)
    engine = assert_engine_agrees(module, lambda x: module(x).sum(1), data)
    run_batch(engine, lambda x: module(x).sum(1), data, 5)
    assert max(len(str(source)) for source in engine._tracker.sources.values()) < 400
