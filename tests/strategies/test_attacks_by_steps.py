"""Steps, backwards and draws that would break the guarantee: refused, or without effect on it."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_dataset, make_loader, make_trainer
from tests.strategies.test_attacks import cross_entropy, fit

# ---------------------------------------------------------------- B: raw optimizers and updates by hand


class ByHand(Classifier):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.automatic_optimization, self.how = False, how
        self.own = torch.optim.SGD(self.network.parameters(), lr=1.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        if self.how == "unwrapped":
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
        elif self.how == "inner":
            optimizer = self.optimizers().optimizer
        elif self.how == "trainer":
            optimizer = self.trainer.optimizers[0]
        else:
            optimizer = self.own
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


@pytest.mark.parametrize("check_per_sample", [True, False])
@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("how", ["unwrapped", "inner", "trainer", "own"])
def test_a_raw_step_is_refused(how: str, microbatch_size: int | None, check_per_sample: bool, tmp_path: Any) -> None:
    module = ByHand(how)
    before = [p.detach().clone() for p in module.network.parameters()]
    with pytest.raises(PrivacyError, match=r"self\.optimizers\(\)"):
        fit(module, tmp_path, microbatch_size=microbatch_size, check_per_sample=check_per_sample)
    for parameter, old in zip(module.network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old)


def test_trials_show_no_raw_gradient_and_move_nothing(tmp_path: Any) -> None:
    seen: list[Any] = []

    class Looking(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self, batch))
            if self.trainer.strategy.is_on_trial:
                seen.extend(p.grad for p in self.parameters())
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.add_(1.0)
                optimizer.param_groups[0]["lr"] = 5.0
            optimizer.step()

    module = Looking(lr=0.0)
    module.automatic_optimization = False
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, tmp_path)
    assert seen
    assert all(gradient is None for gradient in seen)
    assert module.optimizers().param_groups[0]["lr"] == 0.0
    for parameter, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old)


@pytest.mark.parametrize("check_per_sample", [True, False])
@pytest.mark.one_in(2)
def test_hooks_on_parameters_see_no_raw_gradient(check_per_sample: bool, tmp_path: Any, caplog: Any) -> None:
    seen: list[Any] = []
    caplog.set_level(logging.INFO)

    class Watched(Classifier):
        def on_train_start(self) -> None:
            for parameter in self.parameters():
                parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
                parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))

    module = Watched()
    fit(module, tmp_path, check_per_sample=check_per_sample)
    assert seen == []
    assert caplog.text.count("Hooks on private parameters are not called (network.0.weight,") == check_per_sample
    module.training_step(make_dataset().tensors, 0).backward()
    assert len(seen) == 2 * len(list(module.parameters()))  # the hooks are there again


# ---------------------------------------------------------------- C: side effects once per logical batch


class Busy(Classifier):
    """Counts, steps a scheduler by hand, follows its weights, and runs spectral norm's power iteration."""

    def __init__(self, automatic: bool) -> None:
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(NUM_FEATURES, 5))
        super().__init__(nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.Tanh(), nn.Linear(5, NUM_CLASSES)), lr=0.1)
        self.side = first.requires_grad_(False)
        self.automatic_optimization, self.calls = automatic, 0
        self.register_buffer("moved", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.moved += 1
        self.side(batch[0])
        loss = cross_entropy(self, batch)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.lr_schedulers().step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("drawn", [0, 1, 4, 5, 12])
@pytest.mark.one_in(5)
def test_state_after_a_step_is_free_of_the_batch_size(
    drawn: int, automatic: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_dp.sampling.indices import Draw, PoissonBatchSampler

    monkeypatch.setattr(PoissonBatchSampler, "__iter__", lambda self: iter([Draw(range(drawn), entropy=1)]))
    torch.manual_seed(0)
    module = Busy(automatic)
    strategy = DPStrategy(noise_multiplier=0.0, microbatch_size=4)
    loader = DataLoader(TensorDataset(*[t[:16] for t in make_dataset().tensors]), batch_size=16)
    make_trainer(strategy, tmp_path).fit(module, loader)
    assert (module.calls, float(module.moved)) == (1, 1.0)
    assert module.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1
    torch.manual_seed(0)
    fresh = Busy(automatic)
    fresh.side(torch.zeros(1, NUM_FEATURES))
    assert torch.equal(module.side.parametrizations.weight[0]._u, fresh.side.parametrizations.weight[0]._u)


# ---------------------------------------------------------------- I: random streams


@pytest.mark.parametrize("drawn", [1, 7])
def test_draws_do_not_follow_from_seeds_or_batch_sizes(
    drawn: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_dp.sampling.indices import Draw, PoissonBatchSampler

    monkeypatch.setattr(
        PoissonBatchSampler, "__iter__", lambda self: iter([Draw(range(drawn), entropy=1), Draw([0], entropy=2)])
    )
    drawn_at: list[tuple[float, float, float]] = []

    class Drawing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not self.trainer.strategy.is_on_trial:
                drawn_at.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002
            return cross_entropy(self, [nn.functional.dropout(batch[0]), batch[1]])

    for _ in range(2):
        module = Drawing()
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        random.seed(3)
        state = torch.get_rng_state()
        fit(module, tmp_path, make_loader(batch_size=32), check_per_sample=False)
        assert torch.equal(torch.get_rng_state(), state)
    assert len({value for triple in drawn_at for value in triple}) == 12
    drawn_at.clear()
    for _ in range(2):
        fit(Drawing(), tmp_path, make_loader(batch_size=32), check_per_sample=False, seed=5)
    assert drawn_at[:2] == drawn_at[2:]


# ---------------------------------------------------------------- K: refused by name


def test_sparse_adam_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="got SparseAdam"):
        fit(Classifier(optimizer=torch.optim.SparseAdam), tmp_path)


@pytest.mark.parametrize("check_per_sample", [True, False])
@pytest.mark.one_in(2)
def test_a_backward_that_goes_nowhere_is_refused(check_per_sample: bool, tmp_path: Any) -> None:
    class Nowhere(Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            return None

    class Scaled(Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (0.5 * loss).backward()

    with pytest.raises(PrivacyError, match=r"back-propagate the loss"):
        fit(Nowhere(), tmp_path, check_per_sample=check_per_sample)
    assert fit(Scaled(), tmp_path, check_per_sample=check_per_sample).ledger.num_steps == 4


def test_other_backwards_that_go_nowhere_are_refused(tmp_path: Any) -> None:
    class Nowhere(Precision):
        def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
            return None

    class Lost(Tensor):
        def backward(self, *args: Any, **kwargs: Any) -> None:
            return None

    class OfClass(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).as_subclass(Lost)

    class OfInstance(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            loss.backward = lambda *args, **kwargs: None
            self.manual_backward(loss)
            self.optimizers().step()

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match=r"back-propagate the loss"):
        make_trainer(strategy, tmp_path, plugins=[Nowhere()]).fit(Classifier(), make_loader())
    for module in (OfClass(), OfInstance()):
        with pytest.raises(PrivacyError, match=r"back-propagate the loss"):
            fit(module, tmp_path, check_per_sample=False)


def test_backprops_without_any_step_are_refused(tmp_path: Any) -> None:
    class Idle(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(cross_entropy(self, batch))
            self.optimizers().zero_grad()

    module = Idle()
    module.automatic_optimization = False
    with pytest.raises(PrivacyError, match=r"no private optimizer has ever stepped"):
        fit(module, tmp_path)
