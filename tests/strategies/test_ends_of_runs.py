"""What may end a run: counts, and no figure of the records."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Classifier
from tests.strategies.test_written_out import run

# ---------------------------------------------------------------- the end of the run


class Stops(Classifier):
    num = 0

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.num += 1
        if self.num == 6 if self.by == "count" else float(loss.detach()) < 1.1:
            self.trainer.should_stop = True
        return loss


class StopsLate(L.Callback):
    def __init__(self, by: str) -> None:
        self.by = by

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 6 if self.by == "count" else float(outputs["loss"]) < 1.1:
            trainer.should_stop = True


@pytest.mark.parametrize("where", ["step", "callback"])
@pytest.mark.one_in(2)
def test_counts_may_end_a_run_and_losses_may_not(where: str, tmp_path: Any) -> None:
    def attack(by: str) -> DPStrategy:
        given = (Stops(by),) if where == "step" else (Classifier(), StopsLate(by))
        return run(*given[:1], tmp_path, *given[1:], epochs=4)

    counted = attack("count")
    assert counted.ledger.num_steps == 6
    hook = "Stops.training_step" if where == "step" else "StopsLate.on_train_batch_end"
    assert f"perhaps the end of the run, by {hook}" in counted.privacy_statement()
    with pytest.raises(PrivacyError, match=r"should_stop"):
        attack("loss")


class StopsBelow(Classifier):
    """Stops by a threshold that no record of the training set reaches, or by counts."""

    by_data = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.trainer.should_stop = self.global_step >= 5 and (bool(batch[0].amax() < 50) or not self.by_data)
        return loss


def test_a_threshold_beyond_all_records_may_not_end_a_run(tmp_path: Any) -> None:
    with pytest.raises(PrivacyError, match=r"should_stop"):
        run(StopsBelow(), tmp_path, epochs=4)
    counts = StopsBelow()
    counts.by_data = False
    assert run(counts, tmp_path, epochs=4).ledger.num_steps == 6
