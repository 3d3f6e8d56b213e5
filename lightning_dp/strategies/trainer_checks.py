"""Checks of Trainer and module; a refusal uses the name that the user wrote."""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_dp.sampling import LogicalBatch
from lightning_dp.step import module_checks
from lightning_dp.step.settings import Settings
from lightning_dp.strategies import _lightning


def check_trainer(trainer: pl.Trainer, settings: Settings) -> None:
    """Refuse Trainer flags under which the step would not be private, or its noise could not be calibrated."""
    fit_loop = trainer.fit_loop
    if settings.target_epsilon is not None and fit_loop.max_epochs == -1 and fit_loop.max_steps == -1:
        raise ValueError(
            "Expected a bounded run with target_epsilon, got `Trainer(max_epochs=-1)` without max_steps. The noise is calibrated "
            "over all planned steps: set max_epochs or max_steps, or pass noise_multiplier."
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"Expected no `Trainer(gradient_clip_val=...)`, got gradient_clip_val={trainer.gradient_clip_val!r}. It would clip "
            "the already private gradient: use DPStrategy(max_grad_norm=...), which bounds each sample."
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "Expected no GradientAccumulationScheduler, got one in `Trainer(callbacks=...)`. It changes the batch size, and with "
            "it the sample rate, during the run: use `Trainer(accumulate_grad_batches=k)`, microbatch_size or a larger batch."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if settings.target_epsilon is not None and any(isinstance(callback, BatchSizeFinder) for callback in callbacks):
        raise ValueError(
            "Expected a known batch size with target_epsilon, got a search for it (BatchSizeFinder, scale_batch_size). Its trials "
            "train on the data and would spend the target: search under noise_multiplier, or on public data."
        )
    check_precision(str(trainer.precision))
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if isinstance(overfit, float) and overfit > 0:
        raise ValueError(
            f"Expected `Trainer(overfit_batches=...)` to be a whole number, got overfit_batches={overfit!r}. A fraction does not "
            "say which records are sampled from: pass a number of batches."
        )


def check_precision(precision: str) -> None:
    """Refuse float16: scaled or overflowing gradients, skipped steps."""
    if precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"Expected a precision with float32's range, got `Trainer(precision={precision!r})`. Its gradient scaler scales "
            "what is clipped and skips steps: use precision='bf16-mixed'."
        )


def check_module(module: pl.LightningModule, *, runs_samples_alone: bool) -> None:
    """Refuse modules that cannot be private as they are, before any data is touched."""
    module_checks.check_module(module, runs_samples_alone=runs_samples_alone)
    if (
        is_overridden("training_step", module)
        and "dataloader_iter" in inspect.signature(module.training_step).parameters
    ):
        raise ValueError(
            "Expected training_step(self, batch, batch_idx), got training_step(self, dataloader_iter). A step that draws its own "
            "batches cannot be sampled privately: take the batch as an argument."
        )


def check_single_loader(trainer: pl.Trainer) -> None:
    """Refuse several training loaders: which records form one sample of the data would be unclear."""
    combined, source = _lightning.training_sources(trainer)
    loaders = combined.flattened if combined is not None else [source]
    if isinstance(source, (list, tuple, dict)) and len(source) > 1:
        loaders = list(source)
    if len(loaders) > 1:
        raise ValueError(
            f"Expected one training DataLoader, got {len(loaders)}. A logical batch is one Poisson sample of one dataset: join the "
            "datasets (torch.utils.data.StackDataset or ConcatDataset) and return one loader."
        )


def check_not_nested(batch: Any) -> None:
    """Refuse a list or dictionary of loaders, which would give a list or dictionary of logical batches."""
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    if any(isinstance(part, LogicalBatch) for part in parts):
        raise ValueError(
            f"Expected one training DataLoader, got it inside a {type(batch).__name__}. Return the loader itself from "
            "train_dataloader, or pass it itself to fit."
        )


def batches_kept(trainer: pl.Trainer) -> int | None:
    """Return how many logical batches ``overfit_batches`` keeps, or None for the whole training set."""
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    return math.ceil(overfit / trainer.accumulate_grad_batches) if overfit else None


def with_unit_ids(options: dict[str, Any], trainer: pl.Trainer) -> dict[str, Any]:
    """Return options of the private loader with the unit that the datamodule gives, where users are protected without one.

    Raises:
        ValueError: no unit, and no datamodule that gives one.
    """
    if options["unit"] is not None or options["records_per_unit"] is None:
        return options
    ids = getattr(trainer.datamodule, "unit_ids", None)  # type: ignore[attr-defined]
    if ids is None:
        raise ValueError(
            f"Expected a unit with records_per_unit={options['records_per_unit']}, got unit=None and no datamodule with unit_ids. Pass "
            "unit=<key of the items, or one id per record>, or define unit_ids in the datamodule."
        )
    return {**options, "unit": ids() if callable(ids) else ids}


def choices_by_figures(trainer: pl.Trainer) -> set[str]:
    """Return what schedulers and callbacks choose by figures that carry no noise, for the privacy statement."""
    plateaus = {
        f"the learning rate, by {type(config.scheduler).__name__} on {config.monitor!r}"
        for config in trainer.lr_scheduler_configs
        if config.reduce_on_plateau
    }
    monitored = {
        f"{type(callback).__name__} on {callback.monitor!r}"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(getattr(callback, "monitor", None), str) and not _is_public(callback.monitor)
    }
    return plateaus | monitored


def _is_public(name: str) -> bool:
    return name in ("epsilon", "step", "epoch") or name.startswith(("privacy/", "audit/", "communication/"))


def known_arguments(kind: type) -> list[str]:
    """Return the names of all arguments of a strategy: ours, and those of the Lightning strategy below it."""
    names: list[str] = []
    for each in kind.__mro__:
        init = vars(each).get("__init__")
        if init is not None and each is not object:
            found = inspect.signature(init).parameters.values()
            names += [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
            if not any(p.kind is p.VAR_KEYWORD for p in found):
                break
    return names
