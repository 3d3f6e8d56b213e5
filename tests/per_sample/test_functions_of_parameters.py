"""Copies of parameters for the samples, and functions of parameters: how they are made, shared, pulled back, freed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import pulling
from lightning_dp.per_sample.rules.embedding import EmbeddingRule
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.tracking import leaves
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch
from tests.per_sample.test_ways_of_use import WAYS
from tests.per_sample.ways_of_use import Uses, _data, _loss, drawn


def _thrice(way: Callable[[Tensor], Tensor] = F.softplus) -> Uses:
    def function(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x * way(m.gain) + way(m.shift) * m.gain
        return x

    return Uses(function, gain=drawn(3), shift=drawn(3))


def test_elementwise_operations_share_the_copies_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    own = leaves.copies_of
    monkeypatch.setattr(leaves, "copies_of", lambda *args: made.append(1) or own(*args))
    module = Uses(lambda m, x: (x * m.gain).tanh() * m.gain - m.gain, gain=drawn(3))
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    made.clear()
    run_batch(engine, _loss(module), _data(4, 3), 4)
    assert len(made) == 1


BLOCKS: dict[str, tuple[Any, int]] = {
    "entries": (lambda m, x: sum((x * m.w[i, j]).sin() * m.w[i, 0] for i in range(4) for j in range(3)), 1),
    "rows": (lambda m, x: sum((x * w).sin() for w in m.w), 1),
    "rows along a later axis": (lambda m, x: sum((x.movedim(0, 2) * w[:, None]).sin() for w in m.w).movedim(2, 0), 1),
    "entries and rows": (lambda m, x: sum((x * w + w[1]).sin() for w in m.w), 2),
    "rows and the whole": (lambda m, x: sum((x * w).sin() for w in m.w) + F.linear(x, m.w[1:]), 1),
    "one of many": (lambda m, x: x * m.w.flatten()[7], 1),
    "columns": (lambda m, x: sum((x * w).sin() for w in m.w[:3].T), 3),
}


@pytest.mark.parametrize("how", list(BLOCKS))
def test_blocks_of_a_parameter_are_copied_together(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    function, num = BLOCKS[how]
    module, made, own = Uses(function, w=drawn(4, 3)), [], leaves.copies_of
    assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4, memory="lean")
    monkeypatch.setattr(leaves, "copies_of", lambda *args: made.append(1) or own(*args))
    run_batch(engine, _loss(module), _data(4, 3), 4)
    assert len(made) == num


def test_copies_of_blocks_follow_a_parameter_that_changes() -> None:
    module, x = Uses(lambda m, x: sum(x * w for w in m.w), w=drawn(4, 3)), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    for factor in (2.0, 3.0):
        engine.begin(6)
        before = module(x)
        with torch.no_grad():
            module.w.mul_(factor)
        torch.testing.assert_close(module(x), before * factor)
        engine.end()


@pytest.mark.parametrize("how", ["in place", "other memory"])
def test_copies_follow_a_parameter_that_changes_within_a_step(how: str) -> None:
    """As a step of an optimizer does under manual optimization: the next use sees the new values."""
    module, x = Uses(lambda m, x: x * m.gain, gain=drawn(3)), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    for factor in (2.0, 3.0):
        engine.begin(6)
        before = module(x)
        with torch.no_grad():
            if how == "in place":
                module.gain.mul_(factor)
            else:
                module.gain.data = module.gain.data * factor
        torch.testing.assert_close(module(x), before * factor)
        engine.end()


@pytest.mark.parametrize("how", ["together", "too large together", "not mapped"])
def test_functions_of_parameters_are_pulled_back_in_one_pass(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Unless they are too large together, or their backward cannot be mapped over the samples."""
    module, x = _thrice(lambda weight: F.softplus(weight[None])), _data(4, 3)
    engine = make_engine(module, _loss(module), x)
    run_batch(engine, _loss(module), x, 4)
    expected = engine.per_sample_gradients()
    asked: list[bool] = []
    own: Any = torch.autograd.grad

    def grad(*args: Any, is_grads_batched: bool = False, **kwargs: Any) -> Any:
        asked.append(is_grads_batched)
        if is_grads_batched and how == "not mapped":
            raise RuntimeError("no batching rule")
        return own(*args, is_grads_batched=is_grads_batched, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    if how == "too large together":
        monkeypatch.setattr(pulling, "MOST_AT_ONCE", 12)
    run_batch(engine, _loss(module), x, 4)
    grads = engine.per_sample_gradients()
    assert (
        asked
        == {
            "together": [True],
            "too large together": [True] * 2,  # two functions, each used three times
            "not mapped": [True] + 2 * [True, *[False] * 4],
        }[how]
    )
    for name, grad_of_name in grads.items():
        torch.testing.assert_close(grad_of_name, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [1, 2])
def test_a_number_is_pulled_back_without_a_map(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Its gradient is that of all samples, up to a factor; numbers of different parameters take one pass."""

    def function(m: Any, x: Tensor) -> Tensor:
        penalties = [m.gain.exp().square().sum(), m.shift.sin().sum()][:numbers]
        return x * m.gain.softmax(0) + sum(x.mean((1, 2), keepdim=True) * one for one in penalties)

    module = Uses(function, gain=drawn(3), shift=drawn(3))

    def loss(x: Tensor) -> Tensor:
        return module(x).flatten(1).sum(1)

    names = ["gain", "shift"][:numbers]
    engine = assert_engine_agrees(module, loss, _data(4, 3), names=names, size=4)
    asked: list[bool] = []
    own: Any = pulling._vjp
    monkeypatch.setattr(pulling, "_vjp", lambda *a, batched=False: asked.append(batched) or own(*a, batched=batched))
    run_batch(engine, loss, _data(4, 3), 4)
    engine.per_sample_gradients()
    assert asked == [False, True]


ENTRYWISE: dict[str, tuple[Callable[[Any], Tensor], int]] = {
    "chain": (lambda m: m.gain + torch.log1p(m.shift.exp()) * m.noise, 0),
    "twice": (lambda m: m.gain.sigmoid() * m.gain, 0),
    "two of one parameter": (lambda m: F.softplus(m.gain) * m.row + m.gain.exp().cos(), 1),
    "constants that broadcast": (lambda m: torch.where(m.gain > 0, m.gain * 2.0, m.row.abs()) * m.row, 0),
    "row that broadcasts": (lambda m: m.gain * m.row.exp(), 1),
    "transposed": (lambda m: m.gain.T * m.shift, 1),
    "changed through a view": (lambda m: _with_first_row_of_zero(m.gain * 2.0) * m.shift, 1),
    "in place": (lambda m: (m.gain * 2.0).mul_(m.row), 1),
    "sum over entries": (lambda m: m.gain.cumsum(0) * m.shift, 1),
}


def _with_first_row_of_zero(tensor: Tensor) -> Tensor:
    tensor[0].zero_()
    return tensor


@pytest.mark.parametrize("how", list(ENTRYWISE))
def test_a_function_entry_by_entry_is_pulled_back_without_a_map(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Its Jacobian is a diagonal; others are pulled back for each sample."""
    function, num_mapped = ENTRYWISE[how]
    module = Uses(lambda m, x: F.linear(x, function(m)), gain=drawn(3, 3), shift=drawn(3, 3))
    for name, shape in {"noise": (3, 3), "row": (3,)}.items():
        module.register_buffer(name, drawn(*shape).double())
    if how in ("two of one parameter", "row that broadcasts"):
        module.row = nn.Parameter(module._buffers.pop("row"))
    engine = assert_engine_agrees(module, _loss(module), _data(4, 3), size=4)
    asked: list[bool] = []
    own: Any = pulling._vjp
    monkeypatch.setattr(pulling, "_vjp", lambda *a, batched=False: asked.append(batched) or own(*a, batched=batched))
    run_batch(engine, _loss(module), _data(4, 3), 4)
    engine.per_sample_gradients()
    assert sum(asked) == num_mapped


def test_functions_of_parameters_are_freed_with_the_step() -> None:
    module = Uses(lambda m, x: x * m.gain.exp(), gain=drawn(3))
    engine = make_engine(module, _loss(module), _data(4, 3))
    engine.begin(4)
    made = weakref.ref(module.gain.exp())
    engine.end()
    gc.disable()
    try:
        assert made() is None
    finally:
        gc.enable()


def test_views_of_a_parameter_keep_its_rule() -> None:
    """Chunks and transposes of a weight are linear layers without gradients of the weight's size."""
    for way in ("chunks", "product from the left", "codebook"):
        function, held = WAYS[way]
        module = Uses(function, **copy.deepcopy(held))
        engine = make_engine(module, _loss(module), _data(4, 3))
        run_batch(engine, _loss(module), _data(4, 3), 4)
        rules = {type(source.rule) for source in engine._tracker.sources.values() if source.uses or source.memory()}
        assert (EmbeddingRule if way == "codebook" else LinearRule) in rules
        assert (engine._parts._sorted({"w"}, {})[1] == {}) or way == "codebook"


def test_attention_with_dropout_draws_once_for_all_samples() -> None:
    """Its gradients are those of the outputs that it gave."""
    module = nn.MultiheadAttention(4, 2, dropout=0.0, batch_first=True).double()
    data = _data(3, 4)
    engine = make_engine(module, lambda x: module(x, x, x)[0].sum((1, 2)), data)
    module.dropout = 0.5  # off while the layout is learned, as the strategy has it
    engine.begin(6)
    torch.manual_seed(5)
    output = module(data, data, data)[0]
    output.square().sum().backward()
    grads = engine.per_sample_gradients()
    engine.end()
    torch.manual_seed(5)
    plain = module(data, data, data)[0]
    torch.testing.assert_close(plain, output)
    assert not torch.allclose(module(data, data, data)[0], output)
    expected = torch.autograd.grad(plain.square().sum(), list(module.parameters()))
    for (name, _), grad in zip(module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(grads[name].sum(0), grad)


def _tangents(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("mapped", [lambda layer, x: torch.vmap(layer)(x), _tangents], ids=["vmap", "forward mode"])
def test_uses_within_transforms_are_refused(mapped: Any) -> None:
    layer = nn.Linear(3, 2).double()
    with pytest.raises(
        PrivacyError, match=r"linear of 'weight', 'bias' to see the samples.*within torch.vmap.*any module\.$"
    ) as raised:
        make_engine(layer, lambda x: mapped(layer, x).sum(), _data(4, 3))
    assert "sample_of_row" not in str(raised.value)  # which does not help within a transform


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_older_layout_are_refused() -> None:
    layer = nn.Linear(3, 2).double()

    def loss(x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(layer(torch.nested.nested_tensor(list(x[:, None]))), 0.0).sum()

    with pytest.raises(PrivacyError, match=r"linear of 'weight', 'bias' to see tensors with a shape.*any module\.$"):
        make_engine(layer, loss, _data(4, 3))


def test_functions_of_parameters_within_vmap_are_refused() -> None:
    module = Uses(lambda m, x: torch.vmap(lambda row: row @ m.w.exp())(x), w=drawn(3, 2))
    with pytest.raises(PrivacyError, match=r"linear of 'transpose\(exp\(w\)\)' to see .*within torch\.vmap"):
        make_engine(module, _loss(module), _data(4, 3))


def test_later_functions_within_vmap_are_refused() -> None:
    """Torch raises an error of its own there, after which samples would not run one at a time."""
    module = Uses(
        lambda m, x: x @ m.mapped(lambda ones: m.w.exp() * ones)(torch.ones(1, 3, 2).double())[0], w=drawn(3, 2)
    )
    module.mapped = lambda function: function
    engine = make_engine(module, _loss(module), _data(4, 3))
    module.mapped = torch.vmap
    with pytest.raises(PrivacyError, match=r"Expected functions of 'w' alone outside of torch\.func"):
        run_batch(engine, _loss(module), _data(4, 3), 4)


def test_an_error_of_an_operation_stays_as_it_is() -> None:
    """An index out of range, as of a record that a check made NaN, is no reason to run samples one at a time."""
    module, data = Uses(lambda m, x: x * torch.take(m.w, x.abs().long()), w=drawn(3, 2)), _data(4, 3)
    engine = make_engine(module, _loss(module), data)
    with pytest.raises(IndexError, match="out of range"):
        run_batch(engine, _loss(module), data * 1e6, 4)
    engine.end()
