"""Lazy layers: their parameters get shapes by a run on two records, before the private step is made."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_dp.sandbox.sandbox import Sandbox, StepGuard
from lightning_dp.sandbox.snapshot import Snapshot
from lightning_dp.step import module_checks
from lightning_dp.system.torch_private import is_lazy_layer
from lightning_dp.trials.records import TrainingRecords

if TYPE_CHECKING:
    from lightning_dp.strategies.base import PrivateStrategy


class _HaveShapes(BaseException):
    """The end of the run: the last lazy layer has its parameters."""


def give_shapes(strategy: PrivateStrategy) -> None:
    """Run ``training_step`` on two records in a sandbox, where no optimizer steps, until no layer is lazy any more.

    **Guarantee**: new parameters depend on the shapes of two records alone, which count as public: lazy layers see
    zeros in place of values. If the step fails before they have run, they stay lazy, and are refused by name.

    Args:
        strategy: of a Trainer whose data are attached.
    """
    module = strategy.module
    lazy = [layer for layer in module.modules() if is_lazy_layer(layer)]
    if not lazy or module in lazy or strategy.world_size > 1:
        return
    strategy.trainer.fit_loop.setup_data()
    strategy.model_to_device()
    records = TrainingRecords(lambda: strategy.loader, strategy.to_device)
    further = (0,) if len(inspect.signature(module.training_step).parameters) > 1 else ()
    guard = StepGuard(lambda optimizer: True)
    sandbox = Sandbox(module, guard, list, nullcontext)
    handles = [layer.register_forward_pre_hook(_see_zeros, prepend=True, with_kwargs=True) for layer in lazy]
    handles += [layer.register_forward_hook(lambda *_: _end_if_done(lazy)) for layer in lazy]
    guard.start()
    try:
        with sandbox.enter(Snapshot([module], skipped=lazy)):
            strategy.call_training_step(records.batch_of(records.take(2)), further, {})
    except _HaveShapes:
        pass
    except Exception:  # such as a figure that is logged outside of a fit
        module_checks.check_parameters(module)  # so that its error, if a layer is still lazy, comes with the first one
    finally:
        guard.stop()
        for handle in handles:
            handle.remove()


def _see_zeros(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))


def _end_if_done(layers: list[nn.Module]) -> None:
    if not any(map(is_lazy_layer, layers)):
        raise _HaveShapes
