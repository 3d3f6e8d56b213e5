"""Writes and couplings at certain batches, epochs or steps only: their check goes back to the counters of then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier, make_loader, make_trainer, stepped_on

LAST = 3  # number of the last batch of an epoch


class Module(Classifier):
    """Multiplies its loss by a factor, which hooks write."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.count = 1.0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen, self.batch_idx = batch[0].mean().tolist(), batch_idx  # .item() would have the batch compared at once
        self.count += 1
        loss = super().training_step(batch, batch_idx) * self.factor
        return stepped_on(self, loss)


class AtABatch(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.factor = self.seen


class AtTheLastBatch(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == LAST:
            self.factor = self.seen


class AtAStep(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 3:
            self.factor = self.seen


class AtABackward(Module):
    def on_after_backward(self) -> None:
        if self.batch_idx == 2:
            self.factor = self.seen


class BeforeAStep(Module):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step == 5:
            self.factor = self.seen


class AtACount(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.count == 6:
            self.factor = self.seen


class AtTheEndOfAnEpoch(Module):
    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 2:
            self.factor = self.seen


class AtTheStartOfAnEpoch(Module):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.factor = self.seen


class ThawsAtTheStartOfAnEpoch(Module):
    """A hook that cannot run twice in an epoch, as it adds a group to the optimizer, and which steps rely on."""

    is_free = False

    def __init__(self) -> None:
        super().__init__()
        self.network[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.start.shape == self.network[0].weight.shape
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        self.start = self.network[0].weight.detach().clone()
        if self.current_epoch == 2:
            self.network[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": [*self.network[0].parameters()], "lr": 0.01})
            self.factor = 2.0 if self.is_free else self.seen


class RateAtABatch(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.trainer.optimizers[0].param_groups[0]["lr"] = abs(self.seen)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        step = self.global_step
        super().training_step(batch, batch_idx)
        if step == 5:
            self.factor = self.seen


class ManualAtTheEnd(AtAStep):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class CoupledAtABatch(Module):
    """One batch of two that are accumulated has another loss, as those of regular checks do not."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.count += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = self(batch[0])
        if self.count == 7:
            scores = scores - scores.detach().mean(0)
        return nn.functional.cross_entropy(scores, batch[1])


def fit(module: Any, callbacks: Any = (), *, accumulate: int = 1) -> int:
    strategy = DPStrategy(noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-3)
    trainer = make_trainer(strategy, None, max_epochs=4, callbacks=[*callbacks], accumulate_grad_batches=accumulate)
    trainer.fit(module, make_loader())
    return trainer.global_step


WRITING = [
    AtABatch, AtTheLastBatch, AtAStep, AtABackward, BeforeAStep, AtACount, AtTheEndOfAnEpoch, AtTheStartOfAnEpoch,
    ThawsAtTheStartOfAnEpoch, RateAtABatch, Manual, ManualAtTheEnd,
]  # fmt: skip
REFUSED = r"^(The gradient of a record changes with what|training_step leaves .* with another value)"


@pytest.mark.parametrize("kind", WRITING)
@pytest.mark.one_in(4)
def test_a_write_at_some_batches_only_is_refused(kind: type[Module]) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(kind())


@pytest.mark.slow
def test_layers_that_begin_to_train_with_an_epoch_are_free() -> None:
    module = ThawsAtTheStartOfAnEpoch()
    module.is_free = True
    assert fit(module) == 16
    assert [len(group["params"]) for group in module.optimizers().param_groups] == [2, 2]


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("kind", [AtABatch, AtTheLastBatch, AtABackward, AtACount, RateAtABatch])
@pytest.mark.one_in(3)
def test_a_write_between_accumulated_batches_is_refused(kind: type[Module], accumulate: int) -> None:
    with pytest.raises(PrivacyError, match=REFUSED) as raised:
        fit(module := kind(), accumulate=accumulate)
    if kind is not AtACount:  # another check of the batch may have come before the write
        assert ("was released" in str(raised.value)) == (kind is AtTheLastBatch and module.factor != 1.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_coupling_at_some_batches_only_is_refused(accumulate: int) -> None:
    with pytest.raises(PrivacyError, match="amples influence each other"):
        fit(CoupledAtABatch(), accumulate=accumulate)


class RateOfTheLastLoss(Module):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.count:
            self.trainer.optimizers[0].param_groups[0]["lr"] = abs(self.seen)


class RateBeforeTheStep(Module):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.count:
            optimizer.param_groups[0]["lr"] = abs(self.seen)
        optimizer.step(closure=optimizer_closure)


class SavesTheLast(Module):
    """A checkpoint holds what a batch before has shown."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()))
        self.seen = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.last.fill_(self.seen)
        return super().training_step(batch, batch_idx)


class LateFactor(Module):
    """The loss reads what a batch has shown some batches ago."""

    def __init__(self, late: int) -> None:
        super().__init__()
        self.line = deque([1.0] * late, maxlen=late)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.factor = self.line[0]
        loss = super().training_step(batch, batch_idx)
        self.line.append(self.seen)
        return loss


@pytest.mark.parametrize(
    "make", [RateOfTheLastLoss, RateBeforeTheStep, SavesTheLast, lambda: LateFactor(2), lambda: LateFactor(4)]
)
def test_a_batch_that_has_an_effect_later_is_refused(make: Callable[[], Module]) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(make())


class CountsOrSkips(Module):
    """A count goes on with each batch; certain records make it skip."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.factor = 1 / (1 + self.count)
        loss = super().training_step(batch, batch_idx)
        if self.global_step > 2 and (batch[0] > 2.3).any():
            self.count += 100
        return loss


def test_a_count_that_a_record_moves_further_is_refused() -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(CountsOrSkips())


class MovesWeightsAtTheEnd(Module):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 16:
            with torch.no_grad():
                self.network[0].bias.add_(self.seen)


def test_a_write_after_the_last_step_is_refused() -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(MovesWeightsAtTheEnd())


class Acts(L.Callback):
    """Writes the factor of a module in a hook, at a count of its own or of the Trainer's."""

    def __init__(self, hook: str, when: Callable[[Any, L.Trainer], bool]) -> None:
        self.count, self.hook, self.when = 0, hook, when

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self._act("on_train_batch_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._act("on_train_epoch_end", trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._act("on_train_epoch_start", trainer, pl_module)

    def _act(self, hook: str, trainer: L.Trainer, module: Any) -> None:
        if hook == self.hook and self.when(self, trainer):
            module.factor = module.seen


@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("on_train_batch_end", lambda callback, _: callback.count == 6),
        ("on_train_batch_end", lambda _, trainer: trainer.fit_loop.batch_idx == 1),
        ("on_train_batch_end", lambda _, trainer: trainer.global_step == 5),
        ("on_train_epoch_end", lambda _, trainer: trainer.current_epoch == 1),
        ("on_train_epoch_start", lambda _, trainer: trainer.current_epoch == 1),
    ],
)
@pytest.mark.one_in(4)
def test_a_callback_that_writes_at_some_batches_is_refused(hook: str, when: Any) -> None:
    with pytest.raises(PrivacyError, match=REFUSED):
        fit(Module(), [Acts(hook, when)])
