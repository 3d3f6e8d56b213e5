"""Ordinary user code that would break the guarantee: each kind is refused before anything is released."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_FEATURES, Classifier, make_loader, make_trainer


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
