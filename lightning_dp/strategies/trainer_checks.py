"""Checks of Trainer and module; a refusal uses the user's name for the option."""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler

from lightning_dp.step import module_checks
from lightning_dp.step.settings import Settings
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.logs import PUBLIC


def check_trainer(trainer: pl.Trainer, settings: Settings) -> None:
    """Refuse Trainer flags under which the step would not be private, or the noise could not be calibrated."""
    if settings.target_epsilon is not None:
        check_bounded(trainer, "noise_multiplier")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(_lightning.is_a(callback, BatchSizeFinder) for callback in callbacks):
            raise ValueError(
                "Expected a known batch size with target_epsilon, got a search for it (BatchSizeFinder, "
                "scale_batch_size). Its trials train on the data and would spend the target: search under "
                "noise_multiplier, or on public data."
            )
    if accumulation(trainer) and (settings.noise is not None or settings.sampling == "cyclic"):
        raise ValueError(
            "Expected batches of one size with correlated noise or cyclic sampling, got "
            "GradientAccumulationScheduler. Units would come back sooner than accounted for: use "
            "`Trainer(accumulate_grad_batches=...)`."
        )
    check_precision(str(trainer.precision))


def check_bounded(trainer: pl.Trainer, noise: str) -> None:
    """Refuse a run without an end under a target; ``noise`` names the argument that needs no target."""
    if trainer.fit_loop.max_epochs == -1 and trainer.fit_loop.max_steps == -1:
        raise ValueError(
            "Expected a bounded run with target_epsilon, got `Trainer(max_epochs=-1)` without max_steps. The noise is "
            f"calibrated over all planned steps: set max_epochs or max_steps, or pass {noise}."
        )


def describe_clipping(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return a message that says what the Trainer's or module's own clipping acts on; empty if neither clips."""
    if _lightning.is_overridden("configure_gradient_clipping", module):
        name = "configure_gradient_clipping"
    elif trainer.gradient_clip_val:
        name = f"gradient_clip_val={trainer.gradient_clip_val}"
    else:
        return ""
    return (
        f"{name} acts on the private gradient, noise included. The gradient of each sample is clipped by max_grad_norm."
    )


def describe_gradients(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return a message that says where gradients are found; empty if no hook looks for them elsewhere."""
    owners = [module, *getattr(trainer, "callbacks", [])]
    found = [type(owner).__name__ for owner in owners if _lightning.is_overridden("on_after_backward", owner)]
    if not found:
        return ""
    return (
        f"on_after_backward of {', '.join(found)} finds no gradients of private parameters: p.grad is None until the "
        "optimizer steps, because raw gradients are not private. on_before_optimizer_step finds the private ones."
    )


def check_precision(precision: str) -> None:
    """Refuse float16, because it scales gradients, overflows, and skips steps."""
    if precision in ("16-mixed", "16-true"):
        mixed = "Its gradient scaler scales what is clipped and skips steps"
        why = mixed if precision == "16-mixed" else "Gradients of samples and their noise overflow, or round to zero"
        raise ValueError(
            f"Expected a precision with float32's range, got `Trainer(precision={precision!r})`. {why}: use "
            f"precision='bf16-{precision[3:]}'."
        )


def check_module(module: pl.LightningModule) -> None:
    """Refuse module settings that no hook of the fit could still change; layers are checked when training starts."""
    module_checks.check_parameters(module)
    if (
        _lightning.is_overridden("training_step", module)
        and "dataloader_iter" in inspect.signature(module.training_step).parameters
    ):
        raise ValueError(
            "Expected training_step(self, batch, batch_idx), got training_step(self, dataloader_iter). A step that "
            "draws its own batches cannot be sampled privately: take the batch as an argument."
        )


def batches_kept(trainer: pl.Trainer, loader: Any, parts: int) -> int | None:
    """Return the number of logical batches in ``overfit_batches``, or None for the whole training set.

    Args:
        trainer: its ``overfit_batches`` is a number of batches, or a share of the loader's batches.
        loader: loader of the user.
        parts: number of batches per logical batch.

    Raises:
        ValueError: a share of less than one batch, or of a loader without a length.
    """
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if isinstance(overfit, float) and overfit > 0:
        try:
            num_batches = len(loader)
        except TypeError:
            num_batches = 0
        share, overfit = overfit, int(num_batches * overfit)
        if overfit < 1:
            raise ValueError(
                f"Expected at least one batch to overfit on, got overfit_batches={share} of {num_batches} batches. "
                "Pass a whole number of batches."
            )
    return math.ceil(overfit / parts) if overfit else None


def accumulation(trainer: pl.Trainer) -> dict[int, int]:
    """Return the batches per logical batch by first epoch, from ``GradientAccumulationScheduler``; {} without it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _lightning.is_a(callback, GradientAccumulationScheduler):
            return {int(epoch): int(parts) for epoch, parts in callback.scheduling.items()}
    return {}


def parts_now(trainer: pl.Trainer) -> int:
    """Return the number of batches per logical batch in this epoch."""
    scheduled = accumulation(trainer)
    begun = [epoch for epoch in scheduled if epoch <= trainer.current_epoch]
    return scheduled[max(begun)] if begun else trainer.accumulate_grad_batches


def with_unit_ids(options: dict[str, Any], trainer: pl.Trainer) -> dict[str, Any]:
    """Return loader options with the datamodule's unit ids, if users are protected but no unit was given.

    Raises:
        ValueError: no unit, and no datamodule that gives one.
    """
    if options["unit"] is not None or options["records_per_unit"] is None:
        return options
    ids = getattr(trainer.datamodule, "unit_ids", None)  # type: ignore[attr-defined]
    if ids is None:
        raise ValueError(
            f"Expected a unit with records_per_unit={options['records_per_unit']}, got unit=None and no datamodule "
            "with unit_ids. Pass unit=<key of the items, or one id per record>, or define unit_ids in the datamodule."
        )
    return {**options, "unit": ids() if callable(ids) else ids}


def choices_by_figures(trainer: pl.Trainer) -> set[str]:
    """Return the choices of schedulers and callbacks that use un-noised figures, for the privacy statement."""
    plateaus = {
        f"the learning rate, by {type(config.scheduler).__name__} on {config.monitor!r}"
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau
    }
    monitored = {
        f"{type(callback).__name__} on {callback.monitor!r}"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(name := getattr(callback, "monitor", None), str)
        and not (name in ("epsilon", "step", "epoch") or name.startswith(PUBLIC))
    }
    return plateaus | monitored


def known_arguments(kind: type) -> list[str]:
    """Return the names of all arguments of a strategy, including those of its Lightning base class."""
    names: list[str] = [*getattr(kind, "options_without_effect", ())]
    for each in kind.__mro__:
        init = vars(each).get("__init__")
        if init is not None and each is not object:
            found = inspect.signature(init).parameters.values()
            names += [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
            if not any(p.kind is p.VAR_KEYWORD for p in found):
                break
    return names


#: Functions that return a message about hooks of the user's; empty if there are none.
DESCRIPTIONS = (describe_clipping, describe_gradients)
