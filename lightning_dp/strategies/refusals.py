"""What a training step may not do, each refused where it would void the guarantee; and which losses it may return."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import PrivacyError
from lightning_dp.strategies.private_run import PrivateRun


class Refusals(PrivateRun):
    """The checks of a private step, as a mixin over a Lightning strategy; ``PrivateStep`` says when each is made."""

    # ---------------------------------------------------------------- the loss

    def _scalar_loss(self, output: Any, count: int) -> Tensor | None:
        """What ``training_step`` returned as a scalar: a scalar as it is, a loss of shape (B,) reduced over the samples."""
        loss = output.get("loss") if isinstance(output, dict) else output
        if loss is None and not isinstance(output, dict):
            return None
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"Expected training_step to return a loss tensor, a dictionary with 'loss', or None, got {type(loss).__name__}. "
                "Return the loss of shape () or (B,)."
            )
        if loss.dim() == 0:
            return loss
        if loss.dim() == 1 and loss.shape[0] % count == 0:
            return self._reduced(loss)
        raise ValueError(
            f"Expected a loss of shape () or (B,) with B={count} samples, got shape {tuple(loss.shape)}. Reduce it over everything "
            "but the samples."
        )

    def _reduced(self, losses: Tensor) -> Tensor:
        """Losses a sample, combined as ``loss_reduction`` says that a scalar loss combines them."""
        return losses.mean() if self.settings.loss_reduction == "mean" else losses.sum()

    def _zero_loss(self) -> Tensor:
        return torch.zeros((), device=self.root_device, requires_grad=True)

    # ---------------------------------------------------------------- gradients and releases

    def _refuse_changed_accumulation(self, parts: int) -> None:
        assert self._loader is not None
        if parts != self._loader.facts.accumulate:
            raise PrivacyError(
                f"Expected accumulate_grad_batches={self._loader.facts.accumulate} as when the data was set up, got {parts}. Parts of "
                "several logical batches would be summed, and one sample may be in each of them: set it before fit."
            )

    def _refuse_counting_twice(self, index: int) -> None:
        """Under manual optimization a sample may enter the sum of optimizer ``index`` once a step."""
        if index in self._unfinished:
            raise PrivacyError(
                f"Expected each batch's gradients to be stepped or zeroed within its own training_step, got gradients of an earlier "
                f"batch in optimizer {index}. A sample could count twice in one step: use a larger batch_size (microbatch_size "
                "bounds the memory), or call zero_grad before manual_backward."
            )
        if self._deferring and index in self._collected:
            raise PrivacyError(
                f"Expected one step of optimizer {index} a batch under microbatch_size={self.settings.microbatch_size}, got a second "
                "one on the same microbatch. Each sample would enter the sum twice: step once, or leave microbatch_size out."
            )

    def _refuse_raw_gradients(self, index: int) -> None:
        """What a private optimizer is about to step on must come out of ``_release``, all of it."""
        known = {id(p) for p in self._sums[index].parameters.values()} if index in self._sums else set()
        for group in self.optimizers[index].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in known:
                    parameter.grad = None
                    names = [name for name, p in self._module.named_parameters() if p is parameter]
                    raise PrivacyError(
                        f"Expected every gradient that optimizer {index} steps on to be private, got a raw one of "
                        f"{names[0] if names else 'a parameter that is not in the module'!r}. It became trainable within the step: "
                        "change requires_grad in on_train_epoch_start or on_train_batch_start, and register layers in the module."
                    )

    def _refuse_unchecked(self, index: int) -> None:
        if index in self._unchecked_public:
            raise PrivacyError(
                f"Expected public optimizer {index} to step where it was tried, got its first step on a batch whose trial did not "
                "step it. Whether it sees the data is unknown: let batch_idx alone decide when it steps."
            )

    def _refuse_unplanned_release(self) -> None:
        """More releases on one batch than planned are paid; where a target or a budget was promised they are refused."""
        if self.plan.target_epsilon is not None or math.isfinite(self.last_allowed_step):
            raise PrivacyError(
                "Expected each private optimizer to step once a batch under target_epsilon or PrivacyBudget, got a further step on "
                "the same batch. It costs privacy that was not planned for: step once, or pass noise_multiplier and no budget."
            )

    def _refuse_changed_noise(self, drawn: float, needed: float) -> None:
        raise PrivacyError(
            f"Expected noise of std {needed:.6g} on the sum that is released, got the {drawn:.6g} that was settled when its batch "
            "began. Change clipping and noise between batches: in on_train_epoch_start or on_train_batch_start."
        )

    def _refuse_over_budget(self) -> None:
        steps = self.plan.steps
        if self.plan.target_epsilon is not None and steps is not None and self._step >= steps:
            raise PrivacyError(
                f"Expected at most the {steps} planned steps under target_epsilon={self.plan.target_epsilon:g}, got one more. The "
                "noise was calibrated to these: set max_epochs or max_steps before fit, not during it."
            )
        if self._batch_precision == 0.0 and self._step >= self.last_allowed_step:
            raise PrivacyError(
                f"Expected to stop after {self.last_allowed_step} steps, where the privacy budget ends, got one more. Something kept "
                "the Trainer going (min_epochs or min_steps?): lower it, or raise the budget."
            )
