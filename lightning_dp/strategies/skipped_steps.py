"""Batches on which a training step takes no step: that may hang on public counts, never on the samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dp.errors import PrivacyError
from lightning_dp.sampling import collate_samples
from lightning_dp.strategies.first_batch import held_still, spread_samples, try_step

if TYPE_CHECKING:
    from lightning_dp.strategies.private_step import PrivateStep


def check_skip(strategy: PrivateStep, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``training_step`` gave no loss for a batch: it must give none for single samples either.

    Raises:
        PrivacyError: it does, so whether a sample counts hangs on the samples beside it.
    """
    loader = strategy._loader
    assert loader is not None
    for sample in spread_samples(loader, 3):
        with held_still(strategy, seed=0):
            batch = strategy._to_device(collate_samples(loader, [sample]))
            if strategy._call_training_step(batch, rest, kwargs) is not None:
                raise PrivacyError(
                    "Expected training_step to return None for every sample or for none, got None for a batch and a loss for one "
                    "sample alone. One sample could switch off all others: return the loss (a sample that is not finite "
                    "contributes zero anyway), or use microbatch_size=1."
                )


class Counts(NamedTuple):
    """What decides, without looking at samples, when an optimizer steps: the trainer's count and the module's own.

    Args:
        global_step: the trainer's.
        attributes: numbers, flags and words that the module keeps.
    """

    global_step: int
    attributes: dict[str, Any]

    @classmethod
    def of(cls, strategy: PrivateStep) -> Counts:
        """Returns those of this moment."""
        return cls(strategy._trainer.global_step, _counts(strategy._module.__dict__))

    @contextmanager
    def back_in(self, strategy: PrivateStep) -> Iterator[None]:
        """Puts the counts back, and afterwards the trainer's of now and the gradients that the batch has left."""
        progress = strategy._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        gradients = [(parameter, parameter.grad) for parameter in strategy._module.parameters()]
        completed, progress.completed = progress.completed, self.global_step
        own = strategy._module.__dict__
        for name in _counts(own).keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        try:
            yield
        finally:
            progress.completed = completed
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _counts(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, (bool, int, float, str))}


def check_steps(strategy: PrivateStep, rest: tuple[Any, ...], kwargs: dict[str, Any], counts: Counts) -> None:
    """Under manual optimization some private optimizer did not step on a batch: nor may it on single samples.

    Args:
        strategy: the running strategy.
        rest: further arguments of ``training_step``.
        kwargs: the same, by name.
        counts: as they were before this batch.

    Raises:
        PrivacyError: others step there, so whether noise is released hangs on the samples.
    """
    loader = strategy._loader
    assert loader is not None
    real, private = set(strategy._collected), strategy._sums.keys()
    for sample in spread_samples(loader, 3):
        with held_still(strategy, seed=0), counts.back_in(strategy):
            stepped = try_step(strategy, [sample], rest, kwargs, engine_on=False).stepped & private
        if stepped != real:
            raise PrivacyError(
                f"Expected private optimizers to step whatever the samples are, got steps of {sorted(real)} on a batch and of "
                f"{sorted(stepped)} on one sample alone. One sample could switch off all others: let batch_idx or a count decide "
                "when to step (a sample that is not finite contributes zero anyway)."
            )
