"""The planned length of a run, from which schedules, masks and phases are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunLength:
    """Planned length of a run.

    **Guarantee**: public knowledge: limits of the Trainer and the size of the dataset.

    Args:
        steps: number of logical steps of the whole run; None if nothing bounds it.
        steps_per_epoch: number of logical steps of one epoch; None if unknown.
        epochs_differ: whether epochs have different numbers of steps.
    """

    steps: int | None
    steps_per_epoch: int | None
    epochs_differ: bool = False

    def epoch_steps(self, asked_by: str, advice: str) -> int:
        """Return the number of logical steps of one epoch.

        Args:
            asked_by: the argument or callback that counts epochs, for the message.
            advice: alternative for the user, for the message.

        Raises:
            ValueError: the length of an epoch is unknown, or epochs differ.
        """
        if self.epochs_differ:
            raise ValueError(
                f"Expected epochs of equal length with {asked_by}, got GradientAccumulationScheduler, which changes "
                f"their numbers of steps. {advice}"
            )
        if self.steps_per_epoch is None:
            raise ValueError(
                f"Expected a known number of steps per epoch with {asked_by}, got a stream without a length. {advice}"
            )
        return self.steps_per_epoch

    def total_steps(self, asked_by: str, advice: str = "") -> int:
        """Return the number of logical steps of the whole run.

        Args:
            asked_by: the argument or callback that needs the end of the run, for the message.
            advice: further alternative for the user, for the message.

        Raises:
            ValueError: nothing bounds the run.
        """
        if self.steps is None:
            raise ValueError(
                f"Expected a bounded run with {asked_by}, got steps=None. Set `Trainer(max_epochs=...)` or "
                f"`Trainer(max_steps=...)`{advice}."
            )
        return self.steps
