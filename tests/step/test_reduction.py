"""Reductions: one process changes nothing; several add what they hold by one collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_dp.clipping import FlatClipping
from lightning_dp.step.reduction import AllReduce, Reduction

CPU = torch.device("cpu")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Tensors that were summed; the other rank holds the same, and no flag."""
    found: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        found.append(tensor.clone())
        if op == dist.ReduceOp.SUM:
            tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return found


def linear() -> nn.Linear:
    layer = nn.Linear(2, 3)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    return layer


def test_one_process_leaves_everything_as_it_is() -> None:
    reduction, layer = Reduction(), linear()
    parameters = dict(layer.named_parameters())
    accumulator = reduction.make_accumulator(parameters, FlatClipping(1.0), 2)
    accumulator.flat.fill_(3.0)
    reduction.reduce(accumulator)
    assert accumulator.flat.tolist() == [3.0] * 11  # nine coordinates and two statistics
    reduction.average(parameters)
    assert all(bool((p.grad == 1).all()) for p in layer.parameters())
    assert (reduction.rank, reduction.world_size, reduction.noise_share) == (0, 1, 1.0)
    assert [reduction.any(flag) for flag in (True, False)] == [True, False]
    assert reduction.same_count(3) == 3


def test_shares_of_the_noise_add_up_to_its_variance() -> None:
    for world_size in (1, 2, 3, 8):
        shares = [AllReduce(rank, world_size, CPU).noise_share for rank in range(world_size)]
        assert sum(share**2 for share in shares) == pytest.approx(1.0)


def test_a_step_is_one_collective_with_its_statistics(sent: list[torch.Tensor]) -> None:
    reduction = AllReduce(0, 2, CPU)
    accumulator = reduction.make_accumulator(dict(linear().named_parameters()), FlatClipping(1.0), 2)
    accumulator.flat.copy_(torch.arange(11.0))
    reduction.reduce(accumulator)
    assert [len(tensor) for tensor in sent] == [11]
    assert accumulator.flat.tolist() == [2.0 * number for number in range(11)]


def test_public_gradients_are_averaged_by_one_collective(sent: list[torch.Tensor]) -> None:
    layer = linear()
    layer.bias.grad = None  # counts as zero: the other rank may hold one
    AllReduce(0, 2, CPU).average(dict(layer.named_parameters()))
    assert [len(tensor) for tensor in sent] == [9]
    assert bool((layer.weight.grad == 1).all())
    assert layer.bias.grad.tolist() == [0.0] * 3
    AllReduce(0, 2, CPU).average({})
    assert len(sent) == 1


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("flag", [True, False])
def test_any_asks_all_ranks(flag: bool) -> None:
    assert AllReduce(0, 2, CPU).any(flag) is flag


def test_a_lost_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensor: torch.Tensor) -> None:
        raise RuntimeError("connection closed")

    monkeypatch.setattr(dist, "all_reduce", broken)
    reduction = AllReduce(0, 2, CPU)
    accumulator = reduction.make_accumulator(dict(linear().named_parameters()), FlatClipping(1.0), 0)
    with pytest.raises(
        RuntimeError, match="every rank to take part in the sum of a logical step, got connection closed"
    ):
        reduction.reduce(accumulator)
