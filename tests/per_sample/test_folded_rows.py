"""Orders of rows that samples are folded into, and steps within a map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import PerSampleEngine
from tests.per_sample.checks import make_engine, run_batch
from tests.per_sample.owners import _features, assert_agrees, make
from tests.per_sample.ways_of_use import Uses, drawn

# ---------------------------------------------------------------- orders of folded rows


class TwoFolds(nn.Module):
    """One layer on rows that are neighbours, one on rows that are apart and all alike when they are first seen."""

    def __init__(self, *, followed: bool = True) -> None:
        super().__init__()
        self.followed = followed
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.flatten(0, 1)).view(x.shape)
        if not self.followed:
            rows = rows + torch.from_numpy(rows.detach().numpy() * 0)
        apart = (rows * self.gate).transpose(0, 1).reshape(-1, 3)
        return (rows + self.last(apart).view(x.shape[1], -1, 3).transpose(0, 1)).square().sum((1, 2))


def test_rows_all_alike_do_not_take_the_order_of_others() -> None:
    torch.manual_seed(0)
    module, data = TwoFolds(), _features(6, 4, 3)
    engine = assert_agrees(module, module, lambda chosen: data[chosen], size=6)
    assert not engine.follows_owners  # owners settle the order, once


def test_rows_all_alike_whose_owners_are_lost_are_refused() -> None:
    module, data = TwoFolds(followed=False), _features(6, 4, 3)
    with pytest.raises(PrivacyError, match=r"linear of 'last.weight'.*4 rows per sample.*Nor can rows be followed"):
        make(module, module, lambda chosen: data[chosen])


class Frames(nn.Module):
    """A layer on the times of all frames, which are alike; frames are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.last = nn.Linear(2, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        times = self.time(torch.ones(len(x), 2, dtype=x.dtype)).relu().repeat_interleave(x.shape[1], 0)
        return (x.flatten(0, 1) * self.last(times)).view(x.shape).square().sum((1, 2))


def test_constants_all_alike_take_the_order_of_what_they_meet() -> None:
    torch.manual_seed(0)
    module, data = Frames(), _features(6, 4, 3)
    assert assert_agrees(module, module, lambda chosen: data[chosen], size=6).follows_owners


class Experts(nn.Module):
    """Rows sorted by their expert, and one product for the rows of each expert, as mixtures have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(3, 3), nn.Parameter(drawn(2, 3, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x.flatten(0, 1))
        expert = (x.flatten(0, 1)[:, 0] > 0).long()
        order = expert.argsort(stable=True)
        made = _grouped(rows[order], self.weight, expert.bincount(minlength=2).cumsum(0))
        return made[order.argsort()].view(x.shape).square().sum((1, 2))


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """A product that torch dispatches as a whole: rows up to each end with the weight of their own."""
    if torch.overrides.has_torch_function((rows, weight)):
        return torch.overrides.handle_torch_function(_grouped, (rows, weight), rows, weight, ends)
    of = torch.searchsorted(ends, torch.arange(len(rows)), right=True)
    return (rows.unsqueeze(1) @ weight[of.clamp(max=len(weight) - 1)]).squeeze(1)


def test_rows_sorted_by_data_are_not_dealt_out_by_position() -> None:
    module, data = Experts(), _features(6, 4, 3)
    with pytest.raises(PrivacyError, match=r"rows of _grouped of .*in the order of the samples, got them in another"):
        make(module, module, lambda chosen: data[chosen])


def test_a_map_over_samples_does_not_change_the_forward() -> None:
    """Where the layout was learned, one expert had all rows; the map would give each sample the ends of all."""
    module, data = Experts(), _features(6, 4, 3)
    data[..., 0] = data[..., 0].abs() * torch.tensor([-1, -1, 1, 1, 1, 1])[:, None]
    engine = make_engine(module, module, data)
    with pytest.raises(PrivacyError, match=r"Expected _grouped of 'weight' to keep the samples apart"):
        run_batch(engine, module, data, 4)


class BesideNoise(nn.Module):
    """A network on records and on as many rows that no record's data are in, as a critic of generated rows has it."""

    def __init__(self, *, chooses: bool = False) -> None:
        super().__init__()
        self.chooses, self.chosen = chooses, list[int]()
        self.first, self.last, self.scale = nn.Linear(3, 4), nn.Linear(4, 1), nn.Parameter(drawn(4))
        self.double()

    def batch_of(self, chosen: list[int]) -> Tensor:
        self.chosen = [max(number - 1, 0) for number in chosen]  # the noise of the first two is alike, as on trial
        return _features(6, 3)[chosen]

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.tensor([[1.0, number, -0.3 * number] for number in self.chosen], dtype=x.dtype)
        real, made = self.last((self.first(torch.cat([x, noise])) * self.scale).tanh()).squeeze(1).chunk(2)
        losses = nn.functional.softplus(-real) + nn.functional.softplus(made)
        # other records may have no such row
        return losses + self.first(x[x[:, 0] > -9.0]).sum(1) if self.chooses else losses


def test_rows_without_data_belong_to_records_by_position() -> None:
    torch.manual_seed(0)
    module = BesideNoise()
    assert not assert_agrees(module, module, module.batch_of, size=6).follows_owners


def test_rows_without_data_are_refused_where_owners_are_needed() -> None:
    torch.manual_seed(0)
    module = BesideNoise(chooses=True)
    with pytest.raises(PrivacyError, match="some that no sample's data are in"):
        make(module, module, module.batch_of)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.one_in(2)
def test_attention_over_few_tokens_agrees(tokens: int, batch_first: bool, alike: bool) -> None:
    """As many tokens as samples, or half as many; tokens whose values are all equal."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=batch_first).double()
    data = _features(6, 1, 4).expand(6, tokens, 4).contiguous() if alike else _features(6, tokens, 4)

    def loss(x: Tensor) -> Tensor:
        return (layer(x) if batch_first else layer(x.transpose(0, 1)).transpose(0, 1)).square().sum((1, 2))

    for size in (2, 4):
        assert_agrees(layer, loss, lambda chosen: data[chosen], size=size)


def test_one_size_does_not_tell_samples_from_columns() -> None:
    """Two samples in a batch of two columns, where only runs on two were seen."""
    module = nn.Linear(3, 1)
    engine = PerSampleEngine(module)
    rows = engine._rows
    rows._learning_size = 2
    engine.see((torch.zeros(2, 3), torch.zeros(2)))
    rows._learning_size, rows.follows_owners = None, True
    engine.set_parameters(dict(module.named_parameters()))
    engine.begin(2)
    batch = (torch.zeros(2, 3), torch.zeros(2))
    engine.see(batch)
    with pytest.raises(PrivacyError, match="meet rows of known samples"):
        module(batch[0])
    engine.end()


def test_steps_within_torch_func_are_refused_by_name() -> None:
    """A fast weight of each record, by an inner step; torch hides the memory of what it differentiates."""

    def of_one(weight: Tensor, row: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w: (row @ w - 1).square())(weight)
        return (row @ (weight - 0.1 * inner)).square()

    module = Uses(lambda m, x: torch.stack([of_one(m.w, row) for row in x]).mean(), w=drawn(3))
    data = drawn(4, 3).double()
    with pytest.raises(PrivacyError, match="to meet rows of known samples"):
        make(module, module, lambda chosen: data[chosen])
