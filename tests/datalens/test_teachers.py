"""All teachers as one stacked model: the same as one at a time, independent of each other, bounded in memory."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp.datalens import ConvDiscriminator, MLPDiscriminator, top_k_votes
from lightning_dp.datalens.release import VoteRelease
from lightning_dp.datalens.shards import Shards
from lightning_dp.datalens.teachers import Teachers, _fresh_copy, check_discriminator
from lightning_dp.datalens.votes import threshold_votes
from tests.helpers import Largest

NUM, SIZE, WIDTH, CLASSES = 7, 6, 5, 3


def discriminator() -> nn.Module:
    return MLPDiscriminator(WIDTH, num_classes=CLASSES, hidden=8)


def random_shards(num: int = NUM, shape: tuple[int, ...] = (WIDTH,)) -> Shards:
    generator = torch.Generator().manual_seed(0)
    return Shards(
        torch.randn(num, SIZE, *shape, generator=generator), torch.randint(CLASSES, (num, SIZE), generator=generator)
    )


def make(shards: Shards, *, net: nn.Module | None = None, numbers: Any = None, chunk_size: int = 3) -> Teachers:
    return Teachers(
        net or discriminator(),
        shards,
        numbers=range(len(shards.labels)) if numbers is None else numbers,
        lr=0.05,
        betas=(0.5, 0.999),
        chunk_size=chunk_size,
        seed=0,
        device=torch.device("cpu"),
    )


def public_inputs(step: int, num: int = 4, shape: tuple[int, ...] = (WIDTH,)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    fakes = torch.randn(num, *shape, generator=generator)
    return (
        fakes,
        torch.randint(CLASSES, (num,), generator=generator),
        torch.randperm(SIZE, generator=generator)[:num],
    )


def train(teachers: Teachers, steps: int = 3, shape: tuple[int, ...] = (WIDTH,)) -> Teachers:
    for step in range(steps):
        teachers.learn(*public_inputs(step, shape=shape))
    return teachers


def vote(teachers: Teachers, top_k: int = 2, shape: tuple[int, ...] = (WIDTH,)) -> Tensor:
    fakes, labels, _ = public_inputs(9, shape=shape)
    return teachers.sum_of_votes(fakes, labels, top_k)


def one_at_a_time(net: nn.Module, shards: Shards, shape: tuple[int, ...] = (WIDTH,)) -> list[Tensor]:
    """Each teacher alone, as anyone would write it; returns -d/dx BCE(D_i(x, y), 1) of each."""
    gradients = []
    for number in range(len(shards.labels)):
        teacher = _fresh_copy(net, 0, number)
        adam = torch.optim.Adam(teacher.parameters(), lr=0.05, betas=(0.5, 0.999))
        for step in range(3):
            fakes, labels, positions = public_inputs(step, shape=shape)
            real, real_labels = shards.features[number, positions], shards.labels[number, positions]
            on_real, on_fake = teacher(real, real_labels), teacher(fakes, labels)
            bce = F.binary_cross_entropy_with_logits
            loss = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
            adam.zero_grad()
            loss.backward()
            adam.step()
        fakes, labels, _ = public_inputs(9, shape=shape)
        rows = []
        for fake, label in zip(fakes, labels, strict=True):
            x = fake[None].clone().requires_grad_()
            logit = teacher(x, label[None])
            (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(logit, torch.ones_like(logit)), x)
            rows.append(-gradient.flatten())
        gradients.append(torch.stack(rows))
    return gradients


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_stacked_teachers_are_the_loop_over_teachers(kind: str) -> None:
    shape = (WIDTH,) if kind == "mlp" else (1, 8, 8)
    torch.manual_seed(0)
    net = discriminator() if kind == "mlp" else ConvDiscriminator(image_size=8, num_classes=CLASSES, width=4)
    shards = random_shards(shape=shape)
    expected = sum(top_k_votes(gradient, 2) for gradient in one_at_a_time(net, shards, shape))
    votes = vote(train(make(shards, net=net), shape=shape), shape=shape)
    assert float(votes.abs().sum()) > 0
    assert torch.equal(votes, expected)


def test_top_agg_without_noise_is_majority_sign_descent() -> None:
    from lightning_dp.accounting import Ledger, make_accountant
    from tests.datalens.test_release import make_plan

    torch.manual_seed(0)
    net, shards = discriminator(), random_shards()
    majority = torch.stack([gradient.sign() for gradient in one_at_a_time(net, shards)]).sum(0).sign()
    sums = vote(train(make(shards, net=net)), top_k=WIDTH)
    ledger = Ledger("replace_one")
    plan = make_plan(batch_size=4, top_k=WIDTH, noise_std=0.0, num_teachers=NUM)
    noisy = VoteRelease()(sums, plan=plan, ledger=ledger, accountant=make_accountant("gdp"), step=0)
    assert torch.equal(threshold_votes(noisy, 0.0), majority)
    assert math.isinf(make_accountant("gdp").epsilon(ledger, 1e-5))


@pytest.mark.parametrize("chunk_size", [1, 50])
def test_chunks_change_nothing(chunk_size: int) -> None:
    torch.manual_seed(0)
    net, shards = discriminator(), random_shards()
    assert torch.equal(
        vote(train(make(shards, net=net, chunk_size=3))), vote(train(make(shards, net=net, chunk_size=chunk_size)))
    )


def test_ranks_split_the_same_teachers() -> None:
    torch.manual_seed(0)
    net, shards = discriminator(), random_shards()
    whole = vote(train(make(shards, net=net)))
    parts = []
    for rank in range(2):
        own = list(range(rank, NUM, 2))
        parts.append(vote(train(make(Shards(shards.features[own], shards.labels[own]), net=net, numbers=own))))
    assert torch.equal(whole, parts[0] + parts[1])


@pytest.mark.parametrize("replacement", [0.0, 50.0, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.one_in(2)
def test_replaced_record_moves_votes_by_2_sqrt_k_at_most(replacement: float, top_k: int) -> None:
    """Training included; whatever the record holds, only its own teacher changes."""
    torch.manual_seed(0)
    net, shards = discriminator(), random_shards()
    other = Shards(shards.features.clone(), shards.labels.clone())
    other.features[4, 2] = replacement
    other.labels[4, 2] = (other.labels[4, 2] + 1) % CLASSES
    before, after = (vote(train(make(s, net=net), steps=4), top_k) for s in (shards, other))
    assert float((after - before).norm(dim=1).max()) <= 2 * math.sqrt(top_k) + 1e-6
    own = [
        vote(train(make(Shards(s.features[[4]], s.labels[[4]]), net=net, numbers=[4]), steps=4), top_k)
        for s in (shards, other)
    ]
    assert torch.equal(after - before, own[1] - own[0])


def test_opposite_teachers_reach_the_sensitivity() -> None:
    """The bound is tight: one teacher whose votes all turn round moves a sum by exactly 2 sqrt(k)."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return features @ self.weight

    def one(net: Line) -> Tensor:
        shards = Shards(torch.zeros(1, SIZE, 4), torch.zeros(1, SIZE, dtype=torch.long))
        return make(shards, net=net).sum_of_votes(torch.ones(2, 4), torch.zeros(2, dtype=torch.long), 3)

    net, turned = Line(), Line()
    turned.weight.data.neg_()
    assert float((one(net) - one(turned))[0].norm()) == pytest.approx(2 * math.sqrt(3))


def test_teachers_start_apart_from_public_weights() -> None:
    torch.manual_seed(0)
    net = discriminator()
    copies = [_fresh_copy(net, 0, number).layers[0].weight for number in (0, 1, 0)]
    assert torch.equal(copies[0], copies[2])
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], net.layers[0].weight)
    assert not torch.equal(copies[0], _fresh_copy(net, 1, 0).layers[0].weight)
    state = torch.get_rng_state()
    _fresh_copy(net, 0, 0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_memory_is_bounded_by_the_chunk() -> None:
    """No operation of a step makes more than one chunk's activations or weights, however many teachers there are."""
    largest = {}
    for num, chunk_size in ((40, 4), (80, 4), (40, 40)):
        teachers = make(random_shards(num), chunk_size=chunk_size)
        with Largest() as seen:
            vote(train(teachers))
        largest[num, chunk_size] = seen.elements
    assert largest[40, 4] == largest[80, 4] <= 4 * (4 + 4) * (8 + WIDTH + CLASSES)
    assert largest[40, 40] == 10 * largest[40, 4]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), nn.SyncBatchNorm(8)]
)
def test_batch_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"without batch statistics, got \w*BatchNorm\w* at '1'"):
        check_discriminator(nn.Sequential(nn.Linear(8, 8), layer))


def test_a_discriminator_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable parameters"):
        check_discriminator(nn.Sequential(nn.ReLU()))


def test_a_discriminator_of_many_logits_is_refused() -> None:
    class Two(MLPDiscriminator):
        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return super().forward(features, labels).expand(-1, 2)

    with pytest.raises(ValueError, match="one logit per sample"):
        vote(make(random_shards(), net=Two(WIDTH, num_classes=CLASSES)))


def test_the_template_stays_as_it_was() -> None:
    net = discriminator()
    before = copy.deepcopy(net.state_dict())
    train(make(random_shards(), net=net))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
