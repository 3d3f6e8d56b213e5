"""Ordinary user code that would break the guarantee: each kind is refused before anything is released."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_dataset, make_loader, make_trainer


def cross_entropy(module: Any, batch: Any, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1], **options)


def fit(module: Any, tmp_path: Any, loader: Any = None, epochs: int = 1, **options: Any) -> Any:
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, **options})
    trainer = make_trainer(strategy, tmp_path, max_epochs=epochs)
    trainer.fit(module, loader or make_loader())
    return strategy


class Attack(Classifier):
    """A classifier with state of many kinds; ``step`` is what its training step does."""

    step: Callable[[Any, Any], Any]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.queue: Any = deque(maxlen=4)
        self.baseline, self.count = 0.0, 0
        self.frozen = nn.Parameter(torch.zeros(NUM_FEATURES), requires_grad=False)
        self.register_buffer("hidden", torch.zeros(NUM_FEATURES), persistent=False)
        self.register_buffer("saved", torch.zeros(NUM_FEATURES))
        self.fresh = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return type(self).step(self, batch)


def attack(step: Callable[[Any, Any], Any]) -> type[Attack]:
    return type(step.__name__, (Attack,), {"step": staticmethod(step)})


# ---------------------------------------------------------------- D: state written from records


def frozen_parameter_follows_the_data(module: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        module.frozen.mul_(0.9).add_(0.1 * batch[0].mean(0))
    return cross_entropy(module, batch)


def frozen_parameter_through_data(module: Any, batch: Any) -> Tensor:
    module.frozen.data = module.frozen.data + batch[0].mean(0)
    return cross_entropy(module, batch)


def trained_parameter_is_initialised_from_data(module: Any, batch: Any) -> Tensor:
    if module.fresh:
        module.network[0].weight.data[0] = batch[0][0]
        module.fresh = False
    return cross_entropy(module, batch)


def saved_buffer_follows_the_data(module: Any, batch: Any) -> Tensor:
    module.saved.copy_(batch[0].mean(0))
    return cross_entropy(module, batch)


def rate_follows_the_batch_size(module: Any, batch: Any) -> Tensor:
    module.optimizers().param_groups[0]["lr"] = 0.01 * len(batch[0])
    return cross_entropy(module, batch)


def queue_is_read_by_a_later_loss(module: Any, batch: Any) -> Tensor:
    loss = nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    for old in module.queue:
        loss = loss + (module(batch[0]) @ old).square() * 0.1
    module.queue.append(module(batch[0]).detach()[0])
    return loss


def running_baseline_scales_a_later_loss(module: Any, batch: Any) -> Tensor:
    loss = nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")
    scaled = loss * (1.0 + module.baseline)
    module.baseline = 0.9 * module.baseline + 0.1 * float(loss.detach().mean())
    return scaled


def unsaved_buffer_is_read_by_a_later_loss(module: Any, batch: Any) -> Tensor:
    loss = cross_entropy(module, [batch[0] + module.hidden, batch[1]])
    module.hidden += batch[0].mean(0)
    return loss


def count_of_samples_scales_a_later_loss(module: Any, batch: Any) -> Tensor:
    loss = cross_entropy(module, batch) / (1.0 + module.count)
    module.count += len(batch[0])
    return loss


KEPT: list[Any] = []


def global_list_is_read_by_a_later_loss(module: Any, batch: Any) -> Tensor:
    loss = cross_entropy(module, batch) * (1.0 + sum(KEPT[-1:]))
    KEPT.append(float(batch[0].abs().mean()))
    return loss


STATE = [
    frozen_parameter_follows_the_data,
    frozen_parameter_through_data,
    trained_parameter_is_initialised_from_data,
    saved_buffer_follows_the_data,
    rate_follows_the_batch_size,
    queue_is_read_by_a_later_loss,
    running_baseline_scales_a_later_loss,
    unsaved_buffer_is_read_by_a_later_loss,
    count_of_samples_scales_a_later_loss,
    global_list_is_read_by_a_later_loss,
]


@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("step", STATE, ids=lambda step: step.__name__)
@pytest.mark.one_in(2)
def test_state_written_from_records_is_refused(step: Any, microbatch_size: int | None, tmp_path: Any) -> None:
    KEPT.clear()
    if microbatch_size == 1 and step in (rate_follows_the_batch_size, count_of_samples_scales_a_later_loss):
        return  # a step sees one sample always
    module = attack(step)()
    if step is trained_parameter_is_initialised_from_data:
        match = r"network\.0\.weight"
    elif step in (frozen_parameter_follows_the_data, frozen_parameter_through_data):
        match = "frozen"
    elif step is saved_buffer_follows_the_data:
        match = "saved"
    elif step is rate_follows_the_batch_size:
        match = "lr"
    else:
        match = "what training_step saw before"
    with pytest.raises(PrivacyError, match=match):
        fit(module, tmp_path, microbatch_size=microbatch_size)


def test_state_is_found_however_long_a_rehearsed_step_is(tmp_path: Any) -> None:
    """With a bound that clips nothing, a trial step saturates the layers, which hides what a later step reads."""

    def mean_is_kept(module: Any, batch: Any) -> Tensor:
        centred = batch[0] - module.baseline
        module.baseline = 0.9 * module.baseline + 0.1 * batch[0].mean(0)
        return cross_entropy(module, [centred, batch[1]])

    with pytest.raises(PrivacyError, match="changes with what training_step saw before"):
        fit(attack(mean_is_kept)(), tmp_path, max_grad_norm=1e6)


class Hooked(Attack):
    """Writes state from the batch, or from what a step kept of it, in a hook in place of the step."""

    kept: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.kept = batch[0].detach()
        return cross_entropy(self, [batch[0] + self.hidden, batch[1]])


HOOKS: dict[str, Callable[..., Any]] = {
    "on_train_batch_start": lambda self, batch, batch_idx: self.saved.copy_(batch[0].mean(0)),
    "on_train_batch_end": lambda self, outputs, batch, batch_idx: self.saved.copy_(batch[0].mean(0)),
    "on_before_backward": lambda self, loss: self.saved.fill_(float(loss.detach())),
    "on_after_backward": lambda self: self.hidden.copy_(self.kept.mean(0)),
    "on_train_epoch_end": lambda self: self.frozen.data.copy_(self.kept.mean(0)),
}


def _discard(value: object) -> None:
    return None


@pytest.mark.parametrize("microbatch_size", [None, 1])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.one_in(2)
def test_state_written_in_a_hook_is_refused(hook: str, microbatch_size: int | None, tmp_path: Any) -> None:
    module = type("OfModule", (Hooked,), {hook: lambda self, *args: _discard(HOOKS[hook](self, *args))})()
    with pytest.raises(PrivacyError, match=r"with another value after|changes with what training_step saw"):
        fit(module, tmp_path, microbatch_size=microbatch_size)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.one_in(2)
def test_state_written_by_a_callback_is_refused(hook: str, tmp_path: Any) -> None:
    def write(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        HOOKS[hook](module, *args)

    callback = type("Writes", (L.Callback,), {hook: write})()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match=r"with another value after|changes with what training_step saw"):
        make_trainer(strategy, tmp_path, callbacks=[callback]).fit(Hooked(), make_loader())


def test_a_statistic_of_the_batch_from_a_hook_is_refused(tmp_path: Any) -> None:
    class Centred(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.mean = batch[0].mean(0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self, [batch[0] - self.mean, batch[1]])

    with pytest.raises(PrivacyError, match=r"influence each other|when run alone"):
        fit(Centred(), tmp_path)


def test_state_written_by_a_lambda_callback_is_refused(tmp_path: Any) -> None:
    def write(trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.saved.copy_(batch[0].mean(0))

    callback = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=write)
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match="with another value after"):
        make_trainer(strategy, tmp_path, callbacks=[callback]).fit(Hooked(), make_loader())
    assert callback.on_train_batch_end is write


@pytest.mark.parametrize("since", [0, 1, 3])
@pytest.mark.one_in(3)
def test_an_epoch_that_the_data_cut_short_is_refused(since: int, tmp_path: Any) -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx >= since and float(batch[0].abs().max()) > 2.0 else None

    with pytest.raises(PrivacyError, match=r"answer of on_train_batch_start|on_train_batch_start to skip"):
        fit(Skipping(), tmp_path, epochs=3)


@pytest.mark.slow
def test_an_epoch_that_a_count_cuts_short_is_free(tmp_path: Any) -> None:
    class Skipping(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx >= 2 else None

    assert fit(Skipping(), tmp_path, epochs=2).ledger.num_steps == 4


def test_callbacks_run_in_real_batches_only(tmp_path: Any) -> None:
    lines: list[float] = []

    class Prints(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            lines.append(float(outputs["loss"]))

    callback = Prints()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[callback]).fit(Classifier(), make_loader())
    assert len(lines) == 8
    assert "on_train_batch_end" not in vars(callback)


@pytest.mark.slow
def test_a_callback_that_follows_the_weights_is_free(tmp_path: Any) -> None:
    """It writes into the module, is tried once it does, and is left as it was by that."""

    class Follows(L.Callback):
        count = 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.count += 1
            module.frozen.data.mul_(0.9).add_(module.network[0].weight.detach()[0], alpha=0.1)

    callback = Follows()
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[callback]).fit(Hooked(), make_loader())
    assert (callback.count, strategy.ledger.num_steps) == (8, 8)


class Momentum(Classifier):
    """A teacher that follows the student's weights alone, and an output list: both are free."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(NUM_FEATURES, 5).requires_grad_(False)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for old, new in zip(self.teacher.parameters(), self.network[0].parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.detach())
        return loss + (self.network[0](batch[0]) - self.teacher(batch[0])).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 5, 1])
def test_a_teacher_that_follows_the_weights_is_free(tmp_path: Any, microbatch_size: int | None) -> None:
    module = Momentum()
    assert fit(module, tmp_path, microbatch_size=microbatch_size).ledger.num_steps == 4
    assert len(module.seen) == 4


# ---------------------------------------------------------------- E: coins of a batch


def mixed(features: Tensor, share: float = 0.5) -> Tensor:
    return share * features + (1 - share) * features.roll(1, 0)


def coin_of_python(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if random.random() < 0.1 else batch[0], batch[1]])


def coin_of_python_high(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if random.random() > 0.9 else batch[0], batch[1]])


def coin_of_numpy(module: Any, batch: Any) -> Tensor:
    chance = np.random.rand()  # noqa: NPY002
    return cross_entropy(module, [mixed(batch[0]) if chance < 0.15 else batch[0], batch[1]])


def coin_of_torch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if torch.rand(()) < 0.1 else batch[0], batch[1]])


def coin_of_torch_high(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, [mixed(batch[0]) if float(torch.rand(1)) > 0.85 else batch[0], batch[1]])


def coin_of_bernoulli(module: Any, batch: Any) -> Tensor:
    mixes = bool(torch.bernoulli(torch.tensor(0.2)))
    return cross_entropy(module, [mixed(batch[0]) if mixes else batch[0], batch[1]])


def coin_of_randint(module: Any, batch: Any) -> Tensor:
    mixes = int(torch.randint(0, 5, ())) == 4
    return cross_entropy(module, [mixed(batch[0]) if mixes else batch[0], batch[1]])


def mean_over_masked_entries(module: Any, batch: Any) -> Tensor:
    """As masked language models do: a mean over whatever the coins of all samples chose."""
    chosen = torch.full(batch[0].shape, 0.4).bernoulli().bool()
    outputs = (module(batch[0]).sum(1, keepdim=True) - batch[0]).square()
    return outputs[chosen].mean()


def mean_over_uniformly_masked_entries(module: Any, batch: Any) -> Tensor:
    chosen = torch.rand(batch[0].shape) < 0.4
    outputs = (module(batch[0]).sum(1, keepdim=True) - batch[0]).square()
    return (outputs * chosen).sum() / chosen.sum().clamp(min=1)


COINS = [
    coin_of_python,
    coin_of_python_high,
    coin_of_numpy,
    coin_of_torch,
    coin_of_torch_high,
    coin_of_bernoulli,
    coin_of_randint,
    mean_over_masked_entries,
    mean_over_uniformly_masked_entries,
]


@pytest.mark.parametrize("step", COINS, ids=lambda step: step.__name__)
@pytest.mark.one_in(4)
def test_a_coin_that_mixes_a_batch_is_refused(step: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"influence each other|its gradient when run alone"):
        fit(attack(step)(), tmp_path)


@pytest.mark.parametrize("where", ["collate", "transfer"])
@pytest.mark.one_in(2)
def test_a_coin_that_mixes_before_the_step_is_refused(where: str, tmp_path: Any) -> None:
    def collate(samples: list[Any]) -> Any:
        features, labels = torch.utils.data.default_collate(samples)
        return [mixed(features) if where == "collate" and random.random() < 0.1 else features, labels]

    class Mixing(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [mixed(batch[0]) if where == "transfer" and torch.rand(()) < 0.1 else batch[0], batch[1]]

    with pytest.raises(PrivacyError, match="influence each other"):
        fit(Mixing(), tmp_path, DataLoader(make_dataset(), batch_size=16, collate_fn=collate))


# ---------------------------------------------------------------- F: couplings that three samples do not show


def hardest_of_many(module: Any, batch: Any) -> Tensor:
    losses = cross_entropy(module, batch, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.sum() / len(losses) if len(losses) > 10 else losses.mean()


def capacity(module: Any, batch: Any) -> Tensor:
    """Each class takes 12 samples at most; the rest is dropped."""
    losses = cross_entropy(module, batch, reduction="none")
    order = nn.functional.one_hot(batch[1], NUM_CLASSES).cumsum(0).gather(1, batch[1][:, None])[:, 0]
    return (losses * (order <= 4)).mean()


def guard_against_nan(module: Any, batch: Any) -> Any:
    loss = cross_entropy(module, batch)
    return None if torch.isnan(loss) else loss


def nan_to_num_of_the_batch(module: Any, batch: Any) -> Tensor:
    return torch.nan_to_num(cross_entropy(module, batch))


def clamp_of_the_batch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch).clamp(max=20.0)


def small_auxiliary_loss(module: Any, batch: Any) -> Tensor:
    outputs = module(batch[0])
    return nn.functional.cross_entropy(outputs, batch[1]) + 1e-3 * outputs.mean(0).square().sum()


def sign_of_the_batch(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * torch.sign(batch[0].detach().sum() + 1e-9)


def far_below(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * (0.1 if bool((batch[0] < -50).any()) else 1.0)


def empty_record(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) * (0.1 if bool((batch[0] == 0).all(1).any()) else 1.0)


def large_batches(module: Any, batch: Any) -> Tensor:
    """As many samples as Poisson sampling draws now and then."""
    return cross_entropy(module, [batch[0] - batch[0].mean(0) if len(batch[0]) > 40 else batch[0], batch[1]])


def unobserved_scaled_by_the_batch(module: Any, batch: Any) -> Tensor:
    """A record of zeros, of which none is in the data, gets the means of the others."""
    x, y = batch
    return cross_entropy(module, [torch.where((x == 0).all(1, keepdim=True), x.mean(0), x), y])


def missing_filled_up_from_the_batch(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(module, [torch.where(x.isnan(), x.nanmean(0), x), y])


COUPLINGS = [
    unobserved_scaled_by_the_batch,
    missing_filled_up_from_the_batch,
    hardest_of_many,
    far_below,
    empty_record,
    large_batches,
    capacity,
    guard_against_nan,
    nan_to_num_of_the_batch,
    clamp_of_the_batch,
    small_auxiliary_loss,
    sign_of_the_batch,
]


@pytest.mark.parametrize("step", COUPLINGS, ids=lambda step: step.__name__)
@pytest.mark.one_in(2)
def test_a_weak_or_rare_coupling_is_refused(step: Any, tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"influence each other|when run alone"):
        fit(attack(step)(), tmp_path, make_loader(batch_size=32))


def test_a_scale_of_the_batch_for_unobserved_records_is_found(tmp_path: Any) -> None:
    """None is in the data, and only a record that is unobserved but in one of its parts shows the coupling."""

    class Scaled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, observed, weight, y = batch
            scale = torch.where(observed > 0, x.abs().mean(1), x.abs().mean())
            losses = cross_entropy(self, [x / scale[:, None], y], reduction="none")
            return (losses * weight).mean()

    x, y = make_dataset().tensors
    data = TensorDataset(x, torch.ones(len(x)), torch.ones(len(x)), y)
    with pytest.raises(PrivacyError, match="exchanged next to one with missing values"):
        fit(Scaled(), tmp_path, DataLoader(data, batch_size=32))


@pytest.mark.parametrize("since", [1, 9])
@pytest.mark.one_in(2)
def test_a_coupling_that_begins_later_is_found(since: int, tmp_path: Any) -> None:
    class Later(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            features = batch[0] - batch[0].mean(0) if self.global_step >= since else batch[0]
            return cross_entropy(self, [features, batch[1]])

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    with pytest.raises(PrivacyError, match="influence each other"):
        make_trainer(strategy, tmp_path, max_epochs=4).fit(Later(), make_loader())
    assert strategy.ledger.num_steps == since


# ---------------------------------------------------------------- G: rows dealt to the wrong samples


class Sets(Dataset):
    """Each record is a set of 1 to 4 rows."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1 + index % 4, NUM_FEATURES, generator=generator)


def joined(samples: list[Tensor]) -> Any:
    owners = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s) for s in samples]))
    return torch.cat(samples), lambda: owners, len(samples)


class OfSets(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, owners, count = batch
        outputs = torch.zeros(count, NUM_CLASSES).index_add(0, owners(), self(rows))
        return outputs.square().sum(1).mean()


def test_sets_of_different_size_run_one_at_a_time(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can tell whose rows ``index_add`` joins, as no tensor of the batch says it; a set alone owns all of them.
    Its size is not logged.
    """
    loader = DataLoader(Sets(), batch_size=8, collate_fn=joined)
    with pytest.raises(PrivacyError, match="Give it one batch axis"):
        fit(OfSets(), tmp_path, loader, grad_sample="rules")
    caplog.set_level(logging.INFO)
    assert fit(OfSets(), tmp_path, loader).state.runs_alone
    (said,) = [record.message for record in caplog.records if "Samples run one at a time" in record.message]
    assert "is no multiple of the batch size: # of #, # of #" in said
    assert "'network.0.weight'" in said


def test_a_collate_function_that_drops_records_is_refused(tmp_path: Any) -> None:
    def dropping(samples: list[Any]) -> Any:
        kept = [sample for sample in samples if float(sample[0][0]) < 1.2] or samples[:1]
        return torch.utils.data.default_collate(kept)

    with pytest.raises(PrivacyError, match="drops or adds records"):
        fit(Classifier(), tmp_path, DataLoader(make_dataset(), batch_size=16, collate_fn=dropping), epochs=3)


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
def test_hooks_on_parameters_see_no_raw_gradient(check_per_sample: bool, tmp_path: Any) -> None:
    seen: list[Any] = []

    class Watched(Classifier):
        def on_train_start(self) -> None:
            for parameter in self.parameters():
                parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
                parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad))

    module = Watched()
    fit(module, tmp_path, check_per_sample=check_per_sample)
    assert seen == []
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
