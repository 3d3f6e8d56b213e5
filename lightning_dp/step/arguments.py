"""Arguments of private training without a Trainer, with the names and defaults of ``DPStrategy``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from typing_extensions import TypedDict

from lightning_dp import _validate as check
from lightning_dp.clipping import Clipping
from lightning_dp.noise.correlated import CorrelatedNoise
from lightning_dp.run_length import RunLength
from lightning_dp.sampling import SamplingFacts, Unit
from lightning_dp.step.settings import (
    AccountantName,
    ClippingName,
    GradSample,
    LossReduction,
    Relation,
    Sampling,
    Settings,
    UnitGradient,
)


class PrivateArguments(TypedDict, total=False):
    """Arguments with the same meaning as in ``DPStrategy``, which documents them."""

    noise_multiplier: float | None
    target_epsilon: float | None
    target_delta: float | None
    max_grad_norm: float
    clipping: ClippingName | Clipping
    accountant: AccountantName
    sampling: Sampling
    microbatch_size: int | None
    grad_sample: GradSample
    neighboring_relation: Relation
    memory: Literal["fast", "lean"]
    check_per_sample: bool
    allow_public_checkpoint: bool
    secure_rng: bool
    seed: int | None
    loss_reduction: LossReduction
    tune_process: bool
    unit: Unit | None
    records_per_unit: int | None
    unit_gradient: UnitGradient
    noise: CorrelatedNoise | None
    fixed_order: bool
    per_sample_loss: bool


#: Settings of a Trainer without a meaning here: there is one optimizer, which is private, and no ``self.log``.
_OF_A_TRAINER = ("public_optimizers", "strict_logging")


def make_settings(arguments: Mapping[str, Any], *, owner: str) -> Settings:
    """Return the validated settings of a run without a Trainer.

    Args:
        arguments: as the user passed them.
        owner: name of the function or class that took them, for messages.

    Raises:
        TypeError: an unknown argument, or one of the wrong kind.
        ValueError: a value out of range.

    Example:
        >>> make_settings({"noise_multiplier": 1.0}, owner="make_private").max_grad_norm
        1.0
    """
    names = [each.name for each in fields(Settings) if each.name not in _OF_A_TRAINER]
    check.check_keywords(arguments, [*names, "epochs", "steps", "history"], owner=owner)
    return Settings(**arguments)


def check_length(epochs: int | None, steps: int | None, settings: Settings) -> None:
    """Check the planned length of a run.

    Raises:
        ValueError: both are given, or none with ``target_epsilon``.
        TypeError: a value that is not a whole number.
    """
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None:
            check.check_count(name, value)
    if epochs is not None and steps is not None:
        raise ValueError(f"Expected at most one of epochs and steps, got epochs={epochs} and steps={steps}. Pass one.")
    if epochs is None and steps is None and settings.target_epsilon is not None:
        raise ValueError(
            f"Expected epochs or steps with target_epsilon={settings.target_epsilon:g}, got neither. The noise is "
            "calibrated over all planned steps: pass one of them, or noise_multiplier."
        )


def planned_length(epochs: int | None, steps: int | None, facts: SamplingFacts) -> RunLength:
    """Return the planned length of the whole run, resumed parts included.

    Raises:
        ValueError: epochs of a stream without a length.
    """
    if epochs is not None:
        if facts.steps_per_epoch is None:
            raise ValueError(
                f"Expected steps for a stream without a length, got epochs={epochs}. How many steps an epoch has is "
                "unknown: pass steps=..., or give the dataset a length."
            )
        steps = epochs * facts.steps_per_epoch
    return RunLength(steps=steps, steps_per_epoch=facts.steps_per_epoch)
