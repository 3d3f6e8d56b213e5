"""The buffer of sums: what a kept gradient may show, and how much memory it holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_dp.clipping import FlatClipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.accumulator import Accumulator


def make_sums(num_statistics: int = 0) -> Accumulator:
    layer = nn.Linear(3, 2)
    return Accumulator(dict(layer.named_parameters()), FlatClipping(1.0), num_statistics)


def release(sums: Accumulator, value: float) -> None:
    sums.used = True
    sums.add(torch.full((sums.num_coordinates,), value))
    sums.write_grads(sums.gradient, expected_batch_size=2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_kept_gradient_never_shows_a_later_sum(masked: bool) -> None:
    sums = make_sums()
    if masked:
        sums.set_masks([{"weight": torch.eye(2, 3, dtype=torch.bool)}], (1,))
    release(sums, 4.0)
    kept = {name: parameter.grad for name, parameter in sums.parameters.items()}
    before = {name: grad.clone() for name, grad in kept.items() if grad is not None}
    sums.used = True
    sums.add(torch.full((sums.num_coordinates,), 100.0))
    assert all(torch.equal(kept[name], grad) for name, grad in before.items())
    sums.reset()
    assert all(torch.equal(kept[name], grad) for name, grad in before.items())
    release(sums, 8.0)
    assert all(torch.equal(kept[name], grad) for name, grad in before.items())
    assert torch.equal(sums.parameters["bias"].grad, torch.full((2,), 4.0))


def test_what_is_masked_is_zero_in_every_gradient() -> None:
    sums, live = make_sums(num_statistics=1), torch.eye(2, 3, dtype=torch.bool)
    sums.set_masks([{"weight": live}], (1,))
    for value in (2.0, 6.0):
        release(sums, value)
        assert torch.equal(sums.parameters["weight"].grad, live * value / 2)
    assert sums.num_active == 4
    assert sums.payload_bytes == 4 * (4 + 1)


def test_no_buffer_is_held_beside_the_gradients() -> None:
    sums = make_sums()
    release(sums, 1.0)
    storages = {parameter.grad.untyped_storage().data_ptr() for parameter in sums.parameters.values()}
    assert not [value for value in vars(sums).values() if isinstance(value, torch.Tensor)]
    assert len(storages) == 1


def test_a_reset_forgets_what_was_added() -> None:
    sums = make_sums()
    sums.used = True
    sums.add(torch.ones(sums.num_coordinates))
    sums.reset()
    assert not sums.flat.any()
    assert not sums.used


@pytest.mark.parametrize("num_statistics", [0, 2])
def test_a_sum_begins_with_its_noise_and_nothing_else(num_statistics: int) -> None:
    """In a fresh buffer, in one that held the last gradients, and not after a reset."""
    sums = make_sums(num_statistics)
    for _ in range(2):
        sums.begin_with_noise(GaussianNoise(seed=4), 2.0)
        expected = GaussianNoise(seed=4).add_(torch.zeros(sums.num_coordinates), 2.0)
        assert torch.equal(sums.gradient, expected)
        assert not sums.statistics.any()
        assert (sums.used, sums.noise_std) == (True, 2.0)
        sums.statistics.add_(5.0)
        release(sums, 1.0)
        assert torch.equal(sums.parameters["bias"].grad, (expected[6:] + 1) / 2)
        assert (sums.used, sums.noise_std) == (False, None)
        sums.drop_grads()
    sums.begin_with_noise(GaussianNoise(), 2.0)
    sums.reset()
    assert not sums.flat.any()
    assert (sums.used, sums.noise_std) == (False, None)


@pytest.mark.parametrize("released", [True, False])
def test_a_sum_that_is_held_as_its_mean_is_not_divided_again(released: bool) -> None:
    """Once: the next sum is divided at its end unless it says so as well, also after a reset."""
    sums = make_sums()
    for divisor in (2, 1, 2):
        sums.begin_with_noise(GaussianNoise(seed=4), 2.0, divisor)
        noise = GaussianNoise(seed=4).add_(torch.zeros(sums.num_coordinates), 2.0)
        torch.testing.assert_close(sums.gradient, noise / divisor)
        assert (sums.noise_std, sums.divisor) == (2.0, divisor)
        if not released:
            sums.reset()
            assert sums.divisor == 1
            continue
        release(sums, 6.0 / divisor)
        torch.testing.assert_close(sums.parameters["bias"].grad, (noise[6:] + 6.0) / 2)
        assert sums.divisor == 1
        sums.drop_grads()


def test_what_is_masked_is_never_added_up() -> None:
    """Whole contributions, values at positions and a release, in the order of live coordinates; a new mask begins with
    nothing.
    """
    sums = make_sums(num_statistics=1)
    live = {"weight": torch.tensor([[True, False, True], [False, False, True]]), "bias": torch.tensor([False, True])}
    sums.set_masks([live], (1,))
    assert (sums.num_active, sums.flat.shape) == (4, (5,))
    assert [view.tolist() for view in sums.views.values()] == [[0.0, 0.0, 0.0], [0.0]]
    sums.used = True
    sums.add(torch.arange(8.0))
    assert sums.gradient.tolist() == [0.0, 2.0, 5.0, 7.0]
    sums.add_at(torch.tensor([7, 1, 2, 6]), torch.tensor([10.0, 100.0, 20.0, 100.0]))
    assert sums.flat.tolist() == [0.0, 22.0, 5.0, 17.0, 0.0]
    assert sums.read(sums.gradient, torch.arange(8)).tolist() == [0.0, 0.0, 22.0, 0.0, 0.0, 5.0, 0.0, 17.0]
    sums.write_grads(sums.gradient, expected_batch_size=1)
    assert sums.parameters["weight"].grad.tolist() == [[0.0, 0.0, 22.0], [0.0, 0.0, 5.0]]
    assert sums.parameters["bias"].grad.tolist() == [0.0, 17.0]
    sums.used = True
    sums.add(torch.ones(8))
    sums.set_masks([{"bias": torch.tensor([False, True])}], (2,))
    assert not sums.used
    assert sums.flat.tolist() == [0.0] * 8
    assert sums.views["weight"].shape == (2, 3)
    assert list(sums.masks) == ["bias"]


def test_masked_gradients_take_the_memory_of_the_scratch() -> None:
    sums = make_sums()
    sums.set_masks([{"weight": torch.eye(2, 3, dtype=torch.bool)}], (1,))
    scratch = sums.scratch["bias"].untyped_storage().data_ptr()
    release(sums, 4.0)
    assert sums.parameters["bias"].grad.untyped_storage().data_ptr() == scratch
    assert not [v for v in (sums._flat, sums._scratch) if v is not None]
