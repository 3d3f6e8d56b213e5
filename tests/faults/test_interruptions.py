"""User code that raises, and Ctrl+C: nothing half done is left, and the ledger still covers every release (I4, I7)."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dp import DPStrategy
from tests.helpers import Classifier, Recorder, make_dataset, make_loader, make_trainer
from tests.strategies.test_private_step import clipped_sum

#: where user code can raise, and whether the third step has been released by then
HOOKS = {
    "transfer_batch_to_device": False,
    "on_train_batch_start": False,
    "training_step": False,
    "on_before_backward": False,
    "on_after_backward": False,
    "on_before_optimizer_step": True,
    "optimizer_step": False,
    "on_before_zero_grad": False,  # called before the backward
    "on_train_batch_end": False,  # the second step's: it is counted, and released, by then
}
FAIL_AT = 2  # of four logical steps an epoch


class Outside(torch.utils.data.Dataset):
    """State that the sandbox does not put back: that of a dataset."""

    def __init__(self) -> None:
        self.armed, self.microbatch = True, 0


class Interrupted(Classifier):
    """Raises once, in one hook, in its third step."""

    def __init__(self, hook: str, error: BaseException) -> None:
        super().__init__(lr=0.0)
        self.hook, self.error = hook, error
        self.outside = Outside()
        original: Callable[..., Any] = getattr(self, hook)

        def failing(*args: Any, **kwargs: Any) -> Any:
            if self.outside.armed and self.trainer.training and self.steps == FAIL_AT and self.ready():
                self.outside.armed = False
                raise self.error
            return original(*args, **kwargs)

        setattr(self, hook, failing)
        self.steps = 0

    def ready(self) -> bool:
        """In the second microbatch, where a hook is called for each: a sum has begun by then."""
        if self.hook in ("training_step", "on_after_backward", "on_before_backward", "transfer_batch_to_device"):
            self.outside.microbatch += 1
            return self.outside.microbatch == 2
        return True


class Counter(Recorder):
    """Counts the steps from outside the module."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.steps += 1


def noiseless(**options: Any) -> DPStrategy:
    return DPStrategy(noise_multiplier=0.0, microbatch_size=8, max_grad_norm=1e-3, check_per_sample=False, **options)


def check_next_fit(trainer: Any, strategy: DPStrategy, module: Any, recorder: Recorder, released: int) -> None:
    """At q = 1 the next step's sum is that of each record once: nothing of the interrupted batch is in it."""
    recorder.before_step.clear()
    trainer.fit(module, make_loader(batch_size=64))
    expected = clipped_sum(module, *make_dataset().tensors, max_grad_norm=1e-3)
    for name, gradient in recorder.before_step[0].items():
        torch.testing.assert_close(gradient * 64, expected[name], rtol=1e-3, atol=1e-7)
    assert strategy.ledger.num_steps == released + len(recorder.before_step)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.one_in(3)
def test_exception_in_a_hook_leaves_ledger_and_no_sum(tmp_path: Path, hook: str) -> None:
    strategy, recorder = noiseless(), Counter()
    module = Interrupted(hook, ValueError("by the user"))
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=3)
    with pytest.raises(ValueError, match="by the user"):
        trainer.fit(module, make_loader(batch_size=32))
    assert not module.outside.armed
    released = FAIL_AT + HOOKS[hook]
    assert strategy.ledger.num_steps == released
    for name, parameter in module.named_parameters():  # what is left there is what was released
        assert parameter.grad is None or torch.equal(parameter.grad, recorder.before_step[-1][name])
    check_next_fit(trainer, strategy, module, recorder, released)


@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step"])
def test_ctrl_c_leaves_no_sum_and_a_ledger_of_what_was_released(tmp_path: Path, hook: str) -> None:
    """Lightning ends the program; whoever catches that can go on."""
    strategy, recorder = noiseless(), Counter()
    module = Interrupted(hook, KeyboardInterrupt())
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=3)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="1"):
            trainer.fit(module, make_loader(batch_size=32))
    finally:
        signal.signal(signal.SIGINT, handler)
    released = FAIL_AT + HOOKS[hook]
    assert strategy.ledger.num_steps == released
    check_next_fit(trainer, strategy, module, recorder, released)


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
@pytest.mark.one_in(2)
def test_checkpoint_of_an_exception_covers_all_releases(tmp_path: Path, hook: str) -> None:
    """The release is in the ledger before its gradient is anywhere, so the emergency checkpoint may hold one more,
    never fewer.
    """
    saving = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True, filename="{step}", every_n_epochs=100)
    strategy = noiseless()
    module = Interrupted(hook, ValueError("by the user"))
    trainer = make_trainer(strategy, tmp_path, callbacks=[saving, Counter()], enable_checkpointing=True, max_epochs=3)
    with pytest.raises(ValueError, match="by the user"):
        trainer.fit(module, make_loader(batch_size=32))
    (path,) = tmp_path.glob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["lightning_dp"]["ledger"]["num_steps"] == FAIL_AT + HOOKS[hook] >= saved["global_step"] == FAIL_AT
    resumed = noiseless()
    again = make_trainer(resumed, tmp_path, max_epochs=2)
    again.fit(Classifier(lr=0.0), make_loader(batch_size=32), ckpt_path=path, weights_only=True)
    assert resumed.ledger.num_steps == 4 + HOOKS[hook]
