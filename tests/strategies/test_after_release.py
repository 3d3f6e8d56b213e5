"""User code around an optimizer's step: what follows a release may depend on the released gradient alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError, make_private
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_loader, make_trainer
from tests.strategies.test_attacks import cross_entropy, fit


class Keeps(Classifier):
    """Keeps what it saw, for code that runs later."""

    kept: Any = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("saved", torch.zeros(NUM_FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kept = batch[0].detach().mean(0)
        loss = super().training_step(batch, batch_idx)
        self.last = float(loss.detach())
        return loss


def refused(module: Any, tmp_path: Any, match: str = "with another value after", **options: Any) -> None:
    with pytest.raises(PrivacyError, match=match):
        fit(module, tmp_path, **options)


# ---------------------------------------------------------------- optimizers


class ByLoss(torch.optim.SGD):
    """Polyak's step size: of the loss that the closure returns."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            group["lr"] = 0.01 * float(loss)
        return super().step()


def of_module(what: str) -> type[Keeps]:
    class Attacking(Keeps):
        def configure_optimizers(self) -> Any:
            def write(*_: Any) -> None:
                with torch.no_grad():
                    self.network[0].weight[0] += 0.1 * self.kept

            class Reading(torch.optim.SGD):
                def step(self, closure: Any = None) -> Any:
                    loss = super().step(closure)
                    write()
                    return loss

            optimizer = (Reading if what == "step" else torch.optim.SGD)(self.parameters(), lr=0.1)
            if what == "hook":
                optimizer.register_step_post_hook(write)
            if what != "scheduler":
                return optimizer
            rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(self.kept[0]) if step else 1.0)
            return [optimizer], [{"scheduler": rate, "interval": "step"}]

    return Attacking


def test_an_optimizer_that_uses_the_loss_is_refused(tmp_path: Any) -> None:
    refused(Classifier(optimizer=ByLoss), tmp_path)


@pytest.mark.parametrize("what", ["step", "hook", "scheduler"])
def test_an_optimizer_that_reads_the_module_is_refused(what: str, tmp_path: Any) -> None:
    refused(of_module(what)(), tmp_path)


def test_no_optimizer_is_given_the_loss_in_a_real_step(tmp_path: Any) -> None:
    given: list[Any] = []

    class Looking(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            given.append(closure())
            return super().step()

    fit(Classifier(optimizer=Looking), tmp_path, check_per_sample=False)
    assert given == [None] * 4


def test_an_optimizer_of_a_loop_is_tried_too() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = x.detach().mean(0)
            return super().forward(x)

    model = Layer(NUM_FEATURES, NUM_CLASSES)

    class Reading(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            with torch.no_grad():
                model.weight[0] += model.kept

    optimizer = Reading(model.parameters(), lr=0.1)
    budget: Any = {"noise_multiplier": 1.0, "target_delta": 1e-3}
    with make_private(model, optimizer, make_loader(), cross_entropy, epochs=1, **budget) as private:
        batch = next(iter(private.loader))
        with pytest.raises(PrivacyError, match="'weight' with another value after"):
            private.step(batch)
        assert private.ledger.num_steps == 0


# ---------------------------------------------------------------- hooks around the step

AROUND: dict[str, Callable[..., Any]] = {
    "on_before_zero_grad": lambda self, optimizer: self.saved.copy_(0 if self.kept is None else self.kept),
    "on_before_optimizer_step": lambda self, optimizer: self.network[0].weight.grad[0].add_(self.kept),
    "on_train_epoch_start": lambda self: self.saved.copy_(0 if self.kept is None else self.kept),
}


@pytest.mark.parametrize("hook", AROUND)
def test_a_hook_around_the_step_is_judged(hook: str, tmp_path: Any) -> None:
    def write(self: Any, *args: Any) -> None:
        AROUND[hook](self, *args)

    refused(type("OfModule", (Keeps,), {hook: write})(), tmp_path, epochs=2)


@pytest.mark.parametrize("kind", [L.Callback, L.pytorch.callbacks.Timer])
@pytest.mark.parametrize("hook", AROUND)
@pytest.mark.one_in(2)
def test_a_callback_around_the_step_is_judged(hook: str, kind: type[L.Callback], tmp_path: Any) -> None:
    def write(self: Any, trainer: Any, module: Any, *args: Any) -> None:
        AROUND[hook](module, *args)

    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3)
    trainer = make_trainer(strategy, tmp_path, max_epochs=2, callbacks=[type("Writes", (kind,), {hook: write})()])
    with pytest.raises(PrivacyError, match="with another value after"):
        trainer.fit(Keeps(), make_loader())


def test_clipping_by_a_figure_of_the_batch_is_refused(tmp_path: Any) -> None:
    class Clips(Keeps):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=self.last, gradient_clip_algorithm="norm")

    refused(Clips(), tmp_path)


def test_a_learning_rate_by_the_loss_is_refused(tmp_path: Any) -> None:
    class Scales(Keeps):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.param_groups[0]["lr"] = 0.1 * self.last
            optimizer.step()

    refused(Scales(), tmp_path, "'lr'")


@pytest.mark.parametrize("by", ["loss", "count"])
def test_steps_are_left_out_by_counts_alone(by: str, tmp_path: Any) -> None:
    class Skips(Keeps):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            if batch_idx % 2 == 0 if by == "count" else self.last < 1.0:
                optimizer.step()

    if by == "count":
        assert fit(Skips(), tmp_path, epochs=3).ledger.num_steps == 6
    else:
        refused(Skips(), tmp_path, r"steps of \[\] on a batch|with another value after", epochs=3)


def test_a_backward_that_mixes_the_batch_is_refused(tmp_path: Any) -> None:
    class Normalises(Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss / loss.detach()).backward()

    refused(Normalises(), tmp_path, "its gradient when run alone")


# ---------------------------------------------------------------- innocent ones


class Follows(Classifier):
    """A teacher, a learning rate and a clipping that follow weights, counts and released gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = nn.Linear(NUM_FEATURES, 5).requires_grad_(False)
        self.means: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.means.append(loss.detach())
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.teacher.weight.data.lerp_(self.network[0].weight.data, 0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)

    def on_train_epoch_end(self) -> None:
        assert torch.stack(self.means).mean() > 0
        self.means.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher"] = self.teacher.state_dict()


@pytest.mark.slow
def test_code_that_follows_weights_and_counts_is_free(tmp_path: Any) -> None:
    module = Follows(optimizer=torch.optim.AdamW)
    assert fit(module, tmp_path, epochs=3).ledger.num_steps == 12
    state = module.optimizers().optimizer.state
    assert {int(each["step"]) for each in state.values()} == {12}
