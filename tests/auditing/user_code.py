"""Checks of what ordinary user code may do: each raises AssertionError where a build lets through what the guarantee
excludes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dp import DPStrategy, PrivacyError
from lightning_dp.sampling.indices import Draw, PoissonBatchSampler
from tests.auditing.checks import Watching, fit
from tests.helpers import NUM_FEATURES, Classifier, make_dataset, make_loader

BOUND = 1.5


def check_cancelling_positions_stay_within_the_bound(tmp_path: Path) -> None:
    """Records whose positions cancel, (3, 5, -8) times 0.1 and 1e9, through a Linear over positions. Exact."""

    class OverPositions(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(64, 64)), lr=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum((1, 2)).mean()

    for scale in (0.1, 1e9):
        positions = torch.tensor([3.0, 5.0, -8.0])[:, None] * torch.linspace(0.3, 0.7, 64) * scale
        records = positions.expand(16, -1, -1).contiguous()  # of gradients too large to be computed in full
        strategy = Watching(noise_multiplier=1.0, max_grad_norm=BOUND)
        fit(strategy, tmp_path, OverPositions(), DataLoader(TensorDataset(records), batch_size=16))
        moved = float(strategy.clean[0].norm()) / 16
        assert moved <= BOUND * (1 + 1e-5), f"one cancelling record moves the sum by {moved:.3g}, the bound is {BOUND}"


def check_no_raw_step_goes_through(tmp_path: Path) -> None:
    """A module that steps its own optimizer during private training is refused before anything moves."""

    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not hasattr(self, "own"):
                self.own = torch.optim.SGD(self.parameters(), lr=1.0)
            self.own.step()
            return super().training_step(batch, batch_idx)

    _refused(Own, make_loader(), tmp_path, "an optimizer stepped by itself")


def check_side_effects_happen_once(tmp_path: Path) -> None:
    """Twelve samples in microbatches of 4, and none at all: a counter of the module counts 1 in both. Exact."""

    class Counting(Classifier):
        def __init__(self) -> None:
            super().__init__(lr=0.0)
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            return super().training_step(batch, batch_idx)

    for drawn in (0, 12):
        module = Counting()
        strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, microbatch_size=4)
        with _draws([range(drawn)]):
            fit(strategy, tmp_path, module, _one_batch(16))
        assert module.calls == 1, f"a batch of {drawn} samples moved the counter by {module.calls}"


def check_state_from_records_is_refused(tmp_path: Path) -> None:
    """A frozen parameter that follows the batch mean, one sample at a time and in batches."""

    class Following(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(NUM_FEATURES), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
            return super().training_step(batch, batch_idx)

    for microbatch_size in (None, 1):
        _refused(Following, make_loader(), tmp_path, "state written from records", microbatch_size=microbatch_size)


def check_state_from_hooks_is_refused(tmp_path: Path) -> None:
    """A buffer that follows the batch mean, written after each batch."""

    class Following(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(NUM_FEATURES))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if len(batch[0]):
                self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))

    _refused(Following, make_loader(), tmp_path, "state written in a hook")


def check_rare_coins_are_refused(tmp_path: Path) -> None:
    """A batch that is mixed with probability 0.1, and one that is not mixed with probability 0.1."""

    def mixing(rare: bool) -> type[Classifier]:
        class Mixing(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                mixes = random.random() < 0.1 if rare else random.random() > 0.9
                features = batch[0] + batch[0].roll(1, 0) if mixes else batch[0]
                return super().training_step((features, batch[1]), batch_idx)

        return Mixing

    for rare in (True, False):
        _refused(mixing(rare), make_loader(), tmp_path, "a coin that mixes the batch")


def check_couplings_of_real_batches_are_refused(tmp_path: Path) -> None:
    """Hard examples are chosen only where a batch holds more than ten samples: no small trial sees it."""

    class Hardest(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            hard = losses.topk(len(losses) // 2).values if len(losses) > 10 else losses
            return hard.sum() / len(losses)

    _refused(Hardest, make_loader(batch_size=32), tmp_path, "a choice of hard examples")


def check_refilled_records_are_refused(tmp_path: Path) -> None:
    """A collate function that puts a copy of the first record in the place of one out of range: it may count many
    times.
    """

    def refilling(samples: list[Any]) -> Any:
        kept = [sample if float(sample[0].abs().max()) < 50.0 else samples[0] for sample in samples]
        return torch.utils.data.default_collate(kept)

    loader = DataLoader(make_dataset(), batch_size=16, collate_fn=refilling)
    _refused(Classifier, loader, tmp_path, "a copy of one record in the place of another")


def check_steps_that_read_the_batch_are_refused(tmp_path: Path) -> None:
    """A hook after each optimizer step adds the mean of the batch to a weight."""

    class Adding(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.mean = batch[0].mean(0)
            return super().training_step(batch, batch_idx)

        def add(self) -> None:
            self.network[0].weight.data[0] += self.mean

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(lambda *_: self.add())
            return optimizer

    _refused(Adding, make_loader(), tmp_path, "an optimizer step that reads the batch")


def check_items_that_share_memory_are_refused(tmp_path: Path) -> None:
    """A dataset that reads every item into the same memory: a batch holds its last record many times."""

    class OneBuffer(Dataset[Any]):
        buffer = torch.zeros(NUM_FEATURES)

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            features, label = make_dataset()[index]
            return self.buffer.copy_(features), label

    _refused(Classifier, DataLoader(OneBuffer(), batch_size=16), tmp_path, "a dataset with one buffer")


def check_checkpoints_of_records_are_refused(tmp_path: Path) -> None:
    """A module that puts a record into its checkpoint."""

    class Saving(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.first = batch[0][:1]
            return super().training_step(batch, batch_idx)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["first"] = self.first

    _refused(Saving, make_loader(), tmp_path, "a record in a checkpoint")


def check_figures_that_come_back_are_refused(tmp_path: Path) -> None:
    """A loss that is scaled by the loss logged before."""

    class Scaling(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = self.trainer.callback_metrics.get("loss", torch.ones(()))
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss.detach())
            return loss * before

    _refused(Scaling, make_loader(), tmp_path, "a loss scaled by a logged one")


def check_norm_and_sum_see_the_same_draws(tmp_path: Path) -> None:
    """Layer drop by Python's generator, lean memory, gradients far above the bound: a record moves the sum by C at
    most.
    """

    class Dropping(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), lr=0.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.network[0](batch[0])
            if random.random() < 0.5:
                x = x + 1e3 * self.network[1](x)
            return x.sum(1).mean()

    strategy = Watching(noise_multiplier=1.0, max_grad_norm=BOUND, memory="lean")
    loader = DataLoader(TensorDataset(torch.ones(1, 3).repeat(8, 1)), batch_size=8)
    fit(strategy, tmp_path, Dropping(), loader, epochs=10)
    moved = max(float(clean.norm()) / 8 for clean in strategy.clean)
    assert moved <= BOUND * (1 + 1e-5), f"a record moves the sum by {moved:.3g}, the bound is {BOUND}"


def check_draws_are_free_of_earlier_batches(tmp_path: Path) -> None:
    """After ``seed_everything``, one or seven samples in the first batch: what the second one draws must not repeat.
    Exact.
    """
    drawn: list[float] = []

    class Drawing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            nn.functional.dropout(batch[0])
            if not self.trainer.strategy.is_on_trial:
                drawn.append(float(torch.rand(())))
            return super().training_step(batch, batch_idx)

    for _ in range(2):
        torch.manual_seed(3)
        module = Drawing()
        torch.manual_seed(3)
        with _draws([range(7), [0]]):
            fit(_quick(), tmp_path, module, make_loader(batch_size=32))
    half = len(drawn) // 2
    repeated = set(drawn[:half]) & set(drawn[half:])
    assert not repeated, f"{len(repeated)} draws of user code follow from its seed and the batch sizes"


def _quick() -> DPStrategy:
    return DPStrategy(noise_multiplier=1.0, target_delta=1e-3, check_per_sample=False)


def _one_batch(num_records: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*[t[:num_records] for t in make_dataset().tensors]), batch_size=num_records)


def _draws(batches: list[Any]) -> Any:
    """Return a context in which the batches of a pass are these positions."""
    patch = pytest.MonkeyPatch()
    drawn = [Draw(batch, entropy=number + 1) for number, batch in enumerate(batches)]
    patch.setattr(PoissonBatchSampler, "__iter__", lambda self: iter(drawn))
    return _undone(patch)


class _undone:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None:
        self._patch.undo()


def _refused(make: Callable[[], Any], loader: Any, tmp_path: Path, what: str, epochs: int = 1, **options: Any) -> None:
    """Fit, and expect a PrivacyError with an empty ledger or one that ends before the kind had an effect."""
    strategy = DPStrategy(**{"noise_multiplier": 1.0, "target_delta": 1e-3, **options})
    try:
        fit(strategy, tmp_path, make(), loader, epochs=epochs)
    except PrivacyError:
        return
    raise AssertionError(f"{what} was accepted, and {strategy.ledger.num_steps} steps were released")
