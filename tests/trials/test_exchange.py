"""The exchange test's parts: fingerprints differ where another sample's gradient does, and not from rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.step.reduction import Reduction
from lightning_dp.trials import chosen_records, exchange, made_records
from tests.per_sample.checks import make_engine, run_batch

SIZE = 4


def fingerprint_of(x: Tensor, *, coupled: bool = False, leaves: int = 0) -> exchange.Fingerprint:
    torch.manual_seed(3)
    layer = nn.Linear(3, 2).double()

    def loss(batch: Tensor) -> Tensor:
        factor = batch.detach().mean() if coupled else 1.0
        return (layer(batch).square() * factor).sum(1)

    engine = make_engine(layer, loss, torch.ones(SIZE, 3, dtype=torch.float64))
    run_batch(engine, loss, x, len(x))
    weights = exchange.random_weights(len(x), leaves)
    parameters = dict(layer.named_parameters())
    found = [exchange.fingerprint(Reduction(), engine, weights, parameters)]
    engine.end()
    return exchange.join(found, list(x), 1.0, frozenset())


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """A batch, the same with its first sample exchanged, and marks of those that stay."""
    x = torch.randn(SIZE, 3, dtype=torch.float64)
    other = x.clone()
    other[0] = 5.0
    return x, other, torch.arange(SIZE) > 0


def test_independent_samples_agree_and_coupled_ones_differ() -> None:
    x, other, stays = batches()
    one, two = fingerprint_of(x), fingerprint_of(other)
    assert one.shapes == two.shapes
    assert not torch.equal(one.norms[:, 0], two.norms[:, 0])
    exchange.compare(one, two, stays, tolerance=1e-11, what="exchanged")
    one, two = fingerprint_of(x, coupled=True), fingerprint_of(other, coupled=True)
    with pytest.raises(PrivacyError, match="One sample of a batch was exchanged, and the gradients of 3 of 3 others"):
        exchange.compare(one, two, stays, tolerance=1e-6, what="exchanged")


def test_norms_of_a_smaller_batch_are_compared_too() -> None:
    x, _, _ = batches()
    stays = torch.arange(SIZE) < SIZE - 1
    one, two = fingerprint_of(x, leaves=SIZE - 1), fingerprint_of(x[:-1], leaves=SIZE - 1)
    exchange.compare(one, two, stays, tolerance=1e-5, what="left out")


def test_another_direction_is_found_where_norms_agree() -> None:
    x, other, stays = batches()
    one, two = fingerprint_of(x), fingerprint_of(other)
    two.sums = {name: -total for name, total in two.sums.items()}
    with pytest.raises(PrivacyError, match="the others' gradients point elsewhere"):
        exchange.compare(one, two, stays, tolerance=1e-6, what="exchanged")


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-160), (torch.float32, 1e-22)])
def test_a_norm_of_a_floor_of_rounding_is_zero(dtype: torch.dtype, floor: float) -> None:
    """It is scaled by the size of the batch, which differs where a sample is left out."""

    def found(size: int, low: float) -> exchange.Fingerprint:
        norms = torch.tensor([[size * low, 1.0, 1.0]], dtype=dtype)
        return exchange.Fingerprint(norms, {}, size, frozenset())

    stays = torch.ones(3, dtype=torch.bool)
    exchange.compare(found(4, floor), found(3, floor), stays, tolerance=1e-5, what="left out")
    with pytest.raises(PrivacyError, match="1 of 3 others differ"):
        exchange.compare(found(4, 1e-10), found(3, 1e-10), stays, tolerance=1e-5, what="left out")


def test_gradients_that_are_all_zero_tell_nothing() -> None:
    none, some = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert exchange.add_up([none, none], none, 1e-3) is None
    assert exchange.add_up([none, none], some, 1e-3) is False
    assert exchange.add_up([some, none], some, 1e-3) is True
    assert exchange.add_up([some, none], {"w": torch.full((2,), torch.nan)}, 1e-3) is False


def test_steps_and_missing_losses_are_compared() -> None:
    x, other, stays = batches()
    one, two = fingerprint_of(x), fingerprint_of(other)
    two.stepped = frozenset({1})
    with pytest.raises(PrivacyError, match="which optimizers step changes with it"):
        exchange.compare(one, two, stays, tolerance=1e-6, what="exchanged")
    two.stepped, one.norms[:] = one.stepped, 0.0
    with pytest.raises(PrivacyError, match="others differ by more than a million times their length"):
        exchange.compare(one, two, stays, tolerance=1e-6, what="exchanged")
    two.norms = torch.zeros(0, SIZE)
    with pytest.raises(PrivacyError, match="there is no loss any more"):
        exchange.compare(one, two, stays, tolerance=1e-6, what="exchanged")


@pytest.mark.parametrize("size", [3, 8])
def test_random_weights_leave_one_sample_out(size: int) -> None:
    weights = exchange.random_weights(size, 2)
    assert weights.shape == (size,)
    assert weights[2] == 0
    assert int((weights == 0).sum()) == 1
    assert bool((weights < 0).any())
    assert torch.equal(weights, exchange.random_weights(size, 2))


def test_spoiled_record_has_its_floats_replaced() -> None:
    record = {"x": torch.ones(2), "n": 3, "f": 0.5, "a": np.ones(2, np.float32), "i": np.arange(2), "s": "word"}
    found = made_records.spoiled(record, 7.0)
    assert found["x"].tolist() == found["a"].tolist() == [7.0, 7.0]
    assert (found["n"], found["f"], found["s"], found["i"].tolist()) == (3, 7.0, "word", [0, 1])
    assert made_records.has_floats(record)
    assert not made_records.has_floats({"n": 3, "i": np.arange(2), "x": torch.arange(2)})


def test_incomplete_records_lack_one_part_or_are_infinite() -> None:
    record = {"a": torch.ones(2), "n": 3, "b": 0.5}
    groups = [[make(record) for make in group] for group in made_records.incomplete(record, 2)]
    zeros, nans, infinite = [[(float(each["a"][0]), each["b"], each["n"]) for each in group] for group in groups]
    assert zeros == [(0.0, 0.5, 3), (1.0, 0.0, 3)]
    assert np.isnan(nans).tolist() == [[True, False, False], [False, True, False]]
    assert infinite == [(float("inf"), float("inf"), 3)]
    assert [len(group) for group in made_records.incomplete(record, 1)] == [1] * 5
    assert made_records.incomplete({"n": 3}, 2) == []


def test_most_different_records_have_other_labels_or_lengths() -> None:
    record = (torch.ones(3), 1)
    others = [(torch.zeros(3), 1), (torch.zeros(3), 2), (torch.zeros(5), 1)]
    assert chosen_records.most_different(record, others) == [others[1], others[2]]
    assert chosen_records.most_different(record, others[:1]) == others[:1]


def test_the_record_with_the_rarest_label_is_exchanged() -> None:
    """A class that is rare is the one that has a weight of its own."""
    others = [(torch.zeros(3), label) for label in (1, 2, 2, 0, 2, 1)]
    assert chosen_records.most_different((torch.ones(3), 1), others) == [others[3]]
    assert chosen_records.most_different((torch.ones(3), 0), others) == [others[0]]


def test_a_record_is_not_exchanged_for_itself() -> None:
    """It may have been read twice, as part of the real batch and among those left to be exchanged."""
    others = [(torch.ones(3),), (torch.zeros(3),)]
    assert chosen_records.most_different((torch.ones(3),), others) == others[1:]
    assert chosen_records.most_different((torch.ones(3),), others[:1]) == others[:1]


def test_a_record_of_one_row_has_the_shapes_of_the_record() -> None:
    edges = torch.tensor([[1, 2, 0], [3, 4, 5]])
    record = {"x": torch.arange(4.0), "pair": (np.arange(3), edges), "fixed": torch.tensor([7, 8]), "y": 5}
    other = {"x": torch.ones(2), "pair": (np.arange(2), edges[:, :1]), "fixed": torch.tensor([8, 7]), "y": 6}
    made = made_records.of_one_row(record, other)
    assert chosen_records.shape_of(made) == chosen_records.shape_of(record)
    assert made["x"].tolist() == [3.0] * 4
    assert made["pair"][0].tolist() == [2] * 3
    assert made["pair"][1].tolist() == [[0] * 3, [5] * 3]
    assert made["fixed"].tolist() == [7, 8]
    assert record["x"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert made_records.of_one_row((entry for entry in "a"), other) is None


class Sums:
    """Two samples, of which the second has a gradient of zero, whose norm is a floor of rounding."""

    def squared_norms(self, engine: Any, groups: Any) -> Tensor:
        return torch.tensor([[4.0, 1e-40]])

    def weighted_sum(self, engine: Any, factors: Tensor, parameters: Any) -> dict[str, Tensor]:
        return {"weight": factors}


def test_a_gradient_of_zero_has_no_direction() -> None:
    sums: Any = Sums()
    norms, found = exchange.fingerprint(sums, None, torch.tensor([3.0, 3.0]), {"weight": torch.zeros(1)})
    assert norms[0].tolist() == pytest.approx([2.0, 1e-20], rel=1e-3)
    assert found["weight"].tolist() == [1.5, 0.0]
