"""Gradients kept between norms and weighted sum: same numbers, bounded memory, nothing leaves its buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine, engine, stacking
from lightning_dp.per_sample.rules import base, outer_products
from lightning_dp.per_sample.sources import Source
from lightning_dp.per_sample.tracking import uses
from lightning_dp.per_sample.workspace import SHARE, Workspace
from tests.helpers import Largest
from tests.per_sample import checks


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gradients have a way of their own, see test_stacking.py."""
    monkeypatch.setattr(uses, "FEW", 0)
    monkeypatch.setattr(stacking, "FEW", 0)


CPU = torch.device("cpu")
LENGTH = 24
"""Positions: enough that a kept gradient pays for the layers below, few enough that none is small."""


def loss_of(module: nn.Module) -> Callable[[Any], Tensor]:
    return lambda x: module(x).square().flatten(1).sum(1)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 36)).to(dtype)


def data_of(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, LENGTH, 40, dtype=dtype)


def sources_of(made: PerSampleEngine) -> list[Source]:
    return list(made._tracker.sources.values())


def kept_names(made: PerSampleEngine) -> set[str]:
    assert made._workspace is not None
    return set(made._workspace._buffers)


def test_workspace_hands_out_the_same_memory_again() -> None:
    workspace = Workspace(lambda: 1000.0)
    first = workspace.take("a", (4, 5), torch.float32, CPU)
    assert first is not None
    assert first.is_contiguous()
    smaller = workspace.take("a", (3, 5), torch.float32, CPU)
    assert smaller is not None
    assert smaller.shape == (3, 5)
    assert smaller.data_ptr() == first.data_ptr()
    other = workspace.take("b", (4, 5), torch.float32, CPU)
    assert other is not None
    assert other.data_ptr() != first.data_ptr()
    workspace.clear()
    assert workspace.num_bytes == 0


def test_workspace_stays_within_its_limit() -> None:
    workspace = Workspace(lambda: 100.0)
    assert workspace.take("a", (24,), torch.float32, CPU) is not None
    assert workspace.num_bytes <= 100
    assert workspace.take("b", (2,), torch.float32, CPU) is None
    # what outgrows the limit gives back what it had
    assert workspace.take("a", (26,), torch.float32, CPU) is None
    assert workspace.num_bytes == 0
    assert workspace.take("b", (10,), torch.float64, CPU) is not None
    assert workspace.num_bytes <= 100


@pytest.mark.parametrize("share", [0.0, 0.4, 100.0])
def test_kept_and_other_gradients_agree_with_the_loop(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr(engine, "SHARE", share)
    module = network()
    made = checks.assert_engine_agrees(module, loss_of(module), data_of(6))
    assert len(kept_names(made)) == {0.0: 0, 0.4: 1, 100.0: 2}[share]


@pytest.mark.parametrize("block", [1, 5000, 2**20])
def test_product_in_blocks_agrees_with_the_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setitem(base.BLOCK_ELEMENTS, "cpu", block)
    monkeypatch.setattr(outer_products, "prefer_gram", lambda *sizes: False)
    module = network()
    checks.assert_engine_agrees(module, loss_of(module), data_of(6), memory="lean")


@pytest.mark.parametrize("block", [1, 3000])
def test_masked_norms_in_blocks_agree_with_the_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setitem(base.BLOCK_ELEMENTS, "cpu", block)
    module = network()
    made = checks.assert_engine_agrees(module, loss_of(module), data_of(6))
    assert kept_names(made)


def test_kept_gradients_stay_within_their_share() -> None:
    module = network()
    made = checks.make_engine(module, loss_of(module), data_of(6))
    checks.run_batch(made, loss_of(module), data_of(6), 6)
    made.squared_norms([[name for name, _ in module.named_parameters()]])
    records = 8 * 6 * LENGTH * (40 + 30 + 30 + 36)
    parameters = 2 * 8 * sum(p.numel() for p in module.parameters())
    assert made._workspace is not None
    assert 0 < made._workspace.num_bytes <= SHARE * (records + parameters)


def test_lean_keeps_no_large_gradient() -> None:
    module = network()
    made = checks.make_engine(module, loss_of(module), data_of(6), memory="lean")
    checks.run_batch(made, loss_of(module), data_of(6), 6)
    made.squared_norms([[name for name, _ in module.named_parameters()]])
    assert {name for source in sources_of(made) for name in source.memory()} == {"0.bias", "2.bias"}


def test_returned_gradients_survive_the_next_microbatch() -> None:
    module = network()
    loss, data, more = loss_of(module), data_of(6), data_of(6)
    made = checks.make_engine(module, loss, data)
    checks.run_batch(made, loss, data, 6)
    made.squared_norms([["0.weight", "2.weight"]])
    assert kept_names(made)
    grads = made.per_sample_gradients()
    before = {name: grad.clone() for name, grad in grads.items()}
    checks.run_batch(made, loss, more, 6)
    made.squared_norms([["0.weight", "2.weight"]])
    for name, grad in grads.items():
        assert torch.equal(grad, before[name]), name


@pytest.mark.parametrize("sizes", [(6, 3, 6), (2, 6, 5)])
def test_buffers_of_other_batch_sizes_leave_nothing_behind(sizes: tuple[int, ...]) -> None:
    module = network()
    loss, groups = loss_of(module), [[name for name, _ in module.named_parameters()]]
    made = checks.make_engine(module, loss, data_of(2))
    for size in sizes:
        data = data_of(size)
        checks.run_batch(made, loss, data, size)
        expected = sum(grad.flatten(1).square().sum(1) for grad in made.per_sample_gradients().values())
        checks.run_batch(made, loss, data, size)
        torch.testing.assert_close(made.squared_norms(groups)[0], expected)


def test_a_later_backprop_is_not_missed_by_what_is_kept() -> None:
    module = network()
    loss, data = loss_of(module), data_of(6)
    made = checks.make_engine(module, loss, data)
    groups = [["0.weight", "2.weight"]]
    checks.run_batch(made, loss, data, 6)
    once = made.squared_norms(groups)
    loss(data).sum().backward()
    torch.testing.assert_close(made.squared_norms(groups), 4 * once)


def test_a_dead_sample_with_a_kept_gradient_contributes_nothing() -> None:
    module = network(torch.float32)
    loss, data = loss_of(module), data_of(6, torch.float32)
    made = checks.make_engine(module, loss, data)
    groups = [[name for name, _ in module.named_parameters()]]
    alive = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]])
    outs = []
    for broken in (False, True):
        if broken:
            data[2] = float("nan")
        checks.run_batch(made, loss, data, 6)
        norms = made.squared_norms(groups)
        assert norms[0].isfinite().tolist() == [i != 2 or not broken for i in range(6)]
        assert kept_names(made)
        outs.append({name: torch.zeros_like(p) for name, p in module.named_parameters()})
        made.accumulate(alive, groups, outs[-1])
    for name, clean in outs[0].items():
        torch.testing.assert_close(outs[1][name], clean, msg=name)


def test_sums_in_a_wider_type_and_in_strided_memory() -> None:
    module = network(torch.float32)
    loss, data = loss_of(module), data_of(6, torch.float32)
    made = checks.make_engine(module, loss, data)
    names = [name for name, _ in module.named_parameters()]
    for with_norms in (False, True):
        checks.run_batch(made, loss, data, 6)
        if with_norms:
            made.squared_norms([names])
        plain = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        wide = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
        strided = {name: torch.zeros(*p.shape, 2)[..., 0] for name, p in module.named_parameters()}
        for out in (plain, wide, strided):
            made.accumulate(torch.full((1, 6), 0.5), [names], out)
        for name, total in plain.items():
            torch.testing.assert_close(wide[name].float(), total)
            torch.testing.assert_close(strided[name], total)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(
    ("module", "data"),
    [
        (nn.Embedding(5000, 4), torch.randint(5000, (6, LENGTH))),
        (nn.Linear(70, 80), torch.randn(6, 70)),
        (nn.Linear(70, 80), torch.randn(6, 2, 70)),
    ],
    ids=["embedding", "linear", "positions"],
)
def test_no_tensor_of_the_parameters_size_is_made(module: nn.Module, data: Tensor, memory: str) -> None:
    made = checks.make_engine(module, loss_of(module), data, memory=memory)
    names = [name for name, _ in module.named_parameters()]
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    checks.run_batch(made, loss_of(module), data, 6)
    with Largest() as seen:
        made.squared_norms([names])
        made.accumulate(torch.ones(1, 6), [names], out)
    assert 0 < seen.elements < next(module.parameters()).numel()


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("masked", [False, True])
def test_wide_embedding_makes_no_gradient_of_its_size(memory: str, masked: bool) -> None:
    """Also not under a mask, where the norms of other layers are taken from per-sample gradients."""
    entries, size = 20_000, 6
    module = nn.Embedding(entries, 4)
    data = torch.randint(entries, (size, LENGTH))
    made = checks.make_engine(module, loss_of(module), data, memory=memory)
    mask = checks.parameter_masks({"weight": torch.rand(entries, 4) < 0.5}) if masked else None
    out = {"weight": torch.zeros(entries, 4)}
    checks.run_batch(made, loss_of(module), data, size)
    with Largest() as seen:
        made.squared_norms([["weight"]], mask)
        made.accumulate(torch.ones(1, size), [["weight"]], out)
    assert 0 < seen.elements < entries


@pytest.mark.parametrize("positions", [1, 63, 64, 65, 130, 200])
def test_gram_matrices_in_blocks_agree_with_the_product(positions: int) -> None:
    torch.manual_seed(0)
    inputs, backprops = torch.randn(3, positions, 5).double(), torch.randn(3, positions, 7).double()
    expected = torch.bmm(backprops.mT, inputs).square().sum((1, 2))
    torch.testing.assert_close(outer_products.gram_squared_norm(inputs, backprops), expected, rtol=1e-10, atol=0)
    backprops[1, positions // 2, 3] = torch.nan
    assert outer_products.gram_squared_norm(inputs, backprops).isfinite().tolist() == [True, False, True]


def test_room_is_counted_for_what_is_kept_elsewhere() -> None:
    workspace = Workspace(lambda: 100.0)
    assert workspace.admits("a", 60)
    assert workspace.admits("a", 60)  # again: the same memory
    assert not workspace.admits("b", 60)
    assert workspace.take("c", (11,), torch.float32, CPU) is None
    assert workspace.num_bytes == 60
    assert not workspace.admits("a", 101)
    assert workspace.admits("a", 20)
    assert workspace.take("c", (20,), torch.float32, CPU) is not None
