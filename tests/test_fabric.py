"""FabricPrivacy: a loop under Fabric on one device, and in two gloo processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DataParallelStrategy
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import PrivacyError
from lightning_dp.fabric import FabricPrivacy, check_fabric
from tests.helpers import NUM_CLASSES, NUM_FEATURES, make_dataset
from tests.processes import run_two_ranks
from tests.reference import per_sample_gradients

BATCH = 8
CLOSE = {"rtol": 3e-6, "atol": 3e-7}


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)).to(dtype)


def start(fabric: Fabric, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[FabricPrivacy, Any, Any, Any]:
    model = make_model(dtype)
    loader = DataLoader(make_dataset(32, dtype=dtype), batch_size=BATCH, shuffle=True)
    dp = FabricPrivacy(**options)
    return dp, *dp.setup(fabric, model, torch.optim.Adam(model.parameters(), lr=0.1), loader)


def clipped_sum(model: nn.Module, parts: list[Any], bound: float) -> dict[str, Tensor]:
    """Sum of clipped gradients, one sample at a time."""
    features, labels = (torch.cat([part[number] for part in parts]) for number in (0, 1))
    grads = per_sample_gradients(
        model, lambda i: mean_loss(model, (features[i : i + 1], labels[i : i + 1])), len(features)
    )
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, grad) for name, grad in grads.items()}


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.one_in(2)
def test_gradient_equals_a_loop_over_samples(microbatch_size: int | None) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    dp, model, optimizer, loader = start(
        fabric, noise_multiplier=0.0, max_grad_norm=0.5, microbatch_size=microbatch_size
    )
    for batch in loader:
        if batch:
            expected = clipped_sum(copy.deepcopy(model.module), [part for _, part in batch.microbatches], 0.5)
            optimizer.zero_grad()
            dp.backward(mean_loss, batch)
            for name, parameter in model.module.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name] / BATCH, **CLOSE)
            optimizer.step()
    assert dp.steps_taken == 4
    dp.close()


#: Owners of 32 records: one has 24 of them, six have one or two.
OWNERS = [0] * 24 + [1, 1, 2, 3, 4, 5, 6, 6]


def clipped_users(model: nn.Module, parts: list[Any], bound: float) -> dict[str, Tensor]:
    """Sum of the clipped gradients of whole users, each of the mean loss of its records in the batch."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for _, owners, (features, labels) in parts:
        for user in owners.unique():
            rows = owners == user
            loss = mean_loss(model, (features[rows], labels[rows]))
            grads = torch.autograd.grad(loss, list(model.parameters()))
            factor = min(1.0, bound / float(torch.cat([grad.flatten() for grad in grads]).norm()))
            for name, grad in zip(total, grads, strict=True):
                total[name] += factor * grad
    return total


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.one_in(2)
def test_very_unequal_users_are_clipped_once_each(microbatch_size: int | None) -> None:
    model = make_model()
    dp = FabricPrivacy(
        noise_multiplier=0.0, max_grad_norm=0.5, microbatch_size=microbatch_size, unit=OWNERS, records_per_unit=16
    )
    loader = DataLoader(make_dataset(32, dtype=torch.float64), batch_size=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, stepping, batches = dp.setup(Fabric(accelerator="cpu", devices=1), model, optimizer, loader)
    most = 0
    for batch in (batch for _ in range(12) for batch in batches):
        expected = clipped_users(copy.deepcopy(model), batch.parts, 0.5)
        most = max([most, *(int(torch.bincount(owners).max()) for _, owners, _ in batch.parts)])
        stepping.zero_grad()
        dp.backward(mean_loss, batch)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name] / 3, **CLOSE)
        stepping.step()
    assert most == 16  # of the 24 records of one user
    assert (dp.plan.dataset_size, dp.plan.unit) == (7, "user")
    assert "all records of one user" in dp.privacy_statement()
    dp.close()


def test_bf16_precision_of_fabric_is_used() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    dp, model, optimizer, loader = start(fabric, torch.float32, noise_multiplier=0.0, seed=0)
    kinds = set()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        model.module[0].register_forward_hook(lambda layer, args, output: kinds.add(output.dtype))
        return mean_loss(model, batch)

    batch = next(batch for batch in loader if batch)
    expected = clipped_sum(copy.deepcopy(model.module), [part for _, part in batch.microbatches], 1.0)
    dp.backward(loss_fn, batch)
    optimizer.step()
    assert kinds == {torch.bfloat16}
    for name, parameter in model.module.named_parameters():
        assert float((parameter.grad - expected[name] / BATCH).norm()) < 0.05 * float(expected[name].norm()) / BATCH
    dp.close()


def test_checkpoint_of_fabric_resumes(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    options: dict[str, Any] = {"target_epsilon": 3.0, "target_delta": 1e-3, "epochs": 2}
    dp, model, optimizer, loader = start(fabric, **options)
    for batch in loader:
        dp.backward(mean_loss, batch)
        optimizer.step()
    sigma = dp.plan.noise_multiplier
    fabric.save(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer, "lightning_dp": dp})
    dp.close()
    dp, model, optimizer, loader = start(fabric, **options)
    fabric.load(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer, "lightning_dp": dp})
    assert dp.steps_taken == 4
    for batch in loader:
        dp.backward(mean_loss, batch)
        optimizer.step()
    assert (dp.plan.noise_multiplier, dp.steps_taken, dp.steps_left) == (sigma, 8, 0)
    assert 2.9 < dp.epsilon() <= 3.0
    assert "8 steps" in dp.privacy_statement()
    dp.close()
    dp, model, optimizer, loader = start(fabric, **options)
    fabric.load(tmp_path / "last.ckpt", {"optimizer": optimizer}, strict=False)
    with pytest.raises(PrivacyError, match="The optimizer has taken 4 steps and the ledger knows of 0"):
        dp.backward(mean_loss, next(iter(loader)))
    dp.close()


def test_raw_and_coupled_steps_are_refused() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    dp, model, optimizer, loader = start(fabric, noise_multiplier=1.0)
    batch = next(batch for batch in loader if batch)
    with pytest.raises(PrivacyError, match="wrote a raw gradient into a private parameter"):
        fabric.backward(mean_loss(model, batch.microbatches[0][1]))
    with pytest.raises(PrivacyError, match="without a private gradient"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"Expected backward\(loss_fn, batch\) with a function .* got Tensor"):
        dp.backward(mean_loss(model, batch.microbatches[0][1]), batch)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="gradient"):
        dp.backward(lambda model, batch: (model(batch[0]) - model(batch[0]).mean(0)).square().mean(), batch)
    assert dp.ledger.num_steps == 0
    dp.close()


def test_wrong_use_is_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match="FabricPrivacy has no model yet"):
        FabricPrivacy(noise_multiplier=1.0).epsilon()
    with pytest.raises(TypeError, match=r"Expected arguments of FabricPrivacy, got sigma=1\.0"):
        FabricPrivacy(sigma=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Expected epochs or steps with target_epsilon=1, got neither"):
        FabricPrivacy(target_epsilon=1.0)
    with pytest.raises(ValueError, match=r"float32's range, got Fabric\(precision='16-true'\)"):
        check_fabric(Fabric(accelerator="cpu", devices=1, precision="16-true"))
    fabric = Fabric(accelerator="cpu", devices=1, strategy=DataParallelStrategy(parallel_devices=[torch.device("cpu")]))
    with pytest.raises(ValueError, match="on one device or with DDP, got DataParallelStrategy"):
        check_fabric(fabric)


@pytest.mark.slow
def test_losses_that_follow_other_ranks_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    ranks = run_two_ranks(Path(__file__).with_name("fabric_run.py"), tmp_path_factory)
    assert all("Samples influence each other" in rank["refused"] for rank in ranks)
    assert ranks[0]["average"] == ranks[1]["average"]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    ranks = run_two_ranks(Path(__file__).with_name("fabric_run.py"), tmp_path_factory)
    num_parts = []
    for mine, other in zip(ranks[0]["steps"], ranks[1]["steps"], strict=True):
        total: dict[str, Tensor] = {}
        for weights, parts, _ in (mine, other):
            assert all(torch.equal(weights[name], mine[0][name]) for name in weights)
            if parts:
                model = make_model()
                model.load_state_dict(weights)
                found = clipped_sum(model, parts, 0.5)
                total = {name: found[name] + total.get(name, 0.0) for name in found}
        num_parts.append((len(mine[1]), len(other[1])))
        for name in total:
            assert torch.equal(mine[2][name], other[2][name])
            torch.testing.assert_close(mine[2][name], total[name] / 8, **CLOSE)
    assert any(first != second for first, second in num_parts)

    noise = ranks[0]["noise"]
    assert torch.equal(noise, ranks[1]["noise"])
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=noise.numel())
    for factor, fits in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        assert (low < float((noise * 8 / (factor * 0.7 * 0.3)).square().sum()) < high) == fits

    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["epsilon"] == ranks[1]["epsilon"]
    assert 2.9 < ranks[0]["epsilon"] <= 3.0
    assert ranks[0]["facts"] == ranks[1]["facts"] == (200, 2, 0)
    assert min(rank["empty"] for rank in ranks) > 20  # of 200 draws, a third or more
