"""The planned length of a run: in addition to the step, the only input of schedules, masks and phases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunLength:
    """Planned length of a run.

    **Guarantee**: public knowledge: limits of the Trainer and the size of the dataset.

    Args:
        steps: logical steps of the whole run; None if nothing bounds it.
        steps_per_epoch: logical steps of one epoch; None if unknown.
    """

    steps: int | None
    steps_per_epoch: int | None

    def epoch_steps(self, asked_by: str, advice: str) -> int:
        """Return the logical steps of one epoch.

        Args:
            asked_by: the argument or callback that counts epochs, for the message.
            advice: what to do instead, for the message.

        Raises:
            ValueError: the length of an epoch is unknown.
        """
        if self.steps_per_epoch is None:
            raise ValueError(
                f"Expected a known number of steps per epoch with {asked_by}, got a stream without a length. {advice}"
            )
        return self.steps_per_epoch

    def total_steps(self, asked_by: str, advice: str = "") -> int:
        """Return the logical steps of the whole run.

        Args:
            asked_by: the argument or callback that needs the end of the run, for the message.
            advice: a further way out, for the message.

        Raises:
            ValueError: nothing bounds the run.
        """
        if self.steps is None:
            raise ValueError(
                f"Expected a bounded run with {asked_by}, got steps=None. Set `Trainer(max_epochs=...)` or "
                f"`Trainer(max_steps=...)`{advice}."
            )
        return self.steps
