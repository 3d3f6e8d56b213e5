"""Records for trials: how many a batch of a trial holds."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy
from lightning_dp.sampling import private_dataloader
from lightning_dp.trials.records import TrainingRecords
from tests.helpers import make_trainer


def records(num: int, batch_size: int, **options: Any) -> TrainingRecords:
    loader = DataLoader(TensorDataset(torch.randn(num, 2)), batch_size=batch_size, shuffle=True)
    private = private_dataloader(loader, **options)
    return TrainingRecords(lambda: private, lambda batch: batch)


def test_sizes_of_trials_follow_those_that_are_drawn() -> None:
    found = records(1000, 100)
    assert found.drawn_size(1, None, 0) == 120  # two standard deviations above
    sizes = [found.drawn_size(1, None, seed) for seed in range(1, 400)]
    assert sizes == [found.drawn_size(1, None, seed) for seed in range(1, 400)]
    assert 98.5 < sum(sizes) / len(sizes) < 101.5
    assert 8 < torch.tensor(sizes).double().std() < 12
    assert found.drawn_size(2, None, 0) == 64
    assert max(found.drawn_size(1, 60, seed) for seed in range(9)) == 60


@pytest.mark.parametrize(("num", "batch_size", "size"), [(9, 8, 8), (100, 8, 14), (12, 8, 11), (8, 8, 8), (100, 1, 3)])
def test_a_record_is_left_for_the_exchange(num: int, batch_size: int, size: int) -> None:
    assert records(num, batch_size).drawn_size(1, None, 0) == size


def test_batches_of_a_fixed_size_are_tried_in_that_size() -> None:
    found = records(100, 8, sampling="shuffle")
    assert {found.drawn_size(1, None, seed) for seed in range(9)} == {8}
    assert found.drawn_size(1, 5, 0) == 5


def test_a_flat_list_of_parts_is_no_axis_of_records() -> None:
    """Targets of all records in one list: the first two have one each, as most do. A collate function that drops the
    record with two is still seen.
    """

    def flat(samples: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in samples]), "targets": torch.cat([parts for _, parts in samples])}

    def dropping(samples: list[Any]) -> dict[str, Any]:
        return flat([sample for sample in samples if sample is not data[rare]])

    rare = 3
    data = [(torch.randn(2), torch.ones(2 if number == rare else 1)) for number in range(12)]
    for collate, axes in ((flat, ("['x']",)), (dropping, ("['x']", "['targets']"))):
        loader = private_dataloader(DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate))  # type: ignore[arg-type]
        found = TrainingRecords(lambda loader=loader: loader, lambda batch: batch)  # type: ignore[misc]
        assert not {id(each) for each in found.take(2)} & {id(data[rare])}
        found.learn_rows(torch.device("cpu"))
        assert found.axes == axes


class Asking(L.LightningModule):
    """Learned queries that attend to each record of a list, padded to the longest."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.key, self.head = nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 3), nn.Linear(3, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = self.key(nn.utils.rnn.pad_sequence(batch, batch_first=True))
        mask = torch.arange(rows.shape[1]) < torch.tensor([len(record) for record in batch])[:, None]
        asked = self.queries[None].repeat(len(batch), 1, 1)
        mixed = nn.functional.scaled_dot_product_attention(asked, rows, rows, attn_mask=mask[:, None])
        return self.head(mixed).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_record_that_a_trial_repeats_has_tensors_of_its_own(tmp_path: Any) -> None:
    """Else the rows of both would belong to the second."""
    data = [torch.randn(1 + number % 3, 3) for number in range(24)]
    strategy = DPStrategy(noise_multiplier=1.0, grad_sample="rules")
    make_trainer(strategy, tmp_path, max_epochs=1).fit(Asking(), DataLoader(data, batch_size=8, collate_fn=list))  # type: ignore[arg-type]
    assert strategy.ledger.num_steps == 3
