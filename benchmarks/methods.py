"""The methods of the utility benchmark: the additions of each to a private run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L

from benchmarks.tasks import Task
from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    AutoThreshold,
    MagnitudePruning,
    NoiseScheduler,
    PSACClipping,
    RandomSparsification,
    TopAgg,
)

NON_PRIVATE = "non-private"


def _none(task: Task, seed: int) -> list[L.Callback]:
    return []


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: of the row.
        options: of ``DPStrategy``.
        callbacks: task and seed -> callbacks of the Trainer.
        decay: whether the learning rate falls to nothing in a straight line.
        schedule: names the schedule of the noise, on which its calibration depends.
        control: the row that it is fair to compare with, in addition to the baseline; empty for none.
    """

    name: str
    options: dict[str, Any]
    callbacks: Callable[[Task, int], list[L.Callback]] = _none
    decay: bool = False
    schedule: str = "constant"
    control: str = ""


BASELINE = "flat"

METHODS = {
    method.name: method
    for method in (
        Method(NON_PRIVATE, {}),
        Method(BASELINE, {"clipping": "flat"}),
        Method("flat, lr decay", {"clipping": "flat"}, decay=True),
        Method(
            "sparsification .9",
            {"clipping": "flat"},
            lambda task, seed: [RandomSparsification(0.9, seed=seed)],
            control="flat, lr decay",
        ),
        Method("AUTO-S", {"clipping": AutomaticClipping()}),
        Method("AUTO-V", {"clipping": AutomaticClipping(gamma=0.0)}),
        Method("PSAC", {"clipping": PSACClipping()}),
        Method("per layer", {"clipping": "per_layer"}),
        Method(
            "sigma step .85",
            {"clipping": "flat"},
            lambda task, seed: [NoiseScheduler("step", factor=0.85, every_n_epochs=math.ceil(task.epochs / 4))],
            schedule="step .85",
        ),
        Method("AutoThreshold", {"clipping": "flat"}, lambda task, seed: [AutoThreshold()]),
        Method("AdaptiveClipping", {"clipping": "flat"}, lambda task, seed: [AdaptiveClipping()]),
        Method(
            "pruning .5",
            {"clipping": "flat"},
            lambda task, seed: [MagnitudePruning(0.5)],
            control="random mask .5",
        ),
        Method(
            "random mask .5",
            {"clipping": "flat"},
            lambda task, seed: [MagnitudePruning(0.5, scores="random", seed=seed)],
        ),
        Method("TopAgg signs .1", {"clipping": TopAgg(0.1, sign="plain")}),
        Method("TopAgg values .1", {"clipping": TopAgg(0.1, keep_values=True)}),
    )
}
