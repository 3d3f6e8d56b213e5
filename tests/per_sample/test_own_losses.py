"""OwnLosses: the loss of a batch is the mean, or the sum, of the losses of its records alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.owners.own_losses import OwnLosses
from tests.cases import each

B, T, C = 4, 5, 3
WEIGHT = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]


def records() -> tuple[Tensor, Tensor]:
    """Scores (B, T, C), and labels (B, T) of which each record has another number that counts."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, T, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(C, (B, T), generator=generator)
    return scores, labels.masked_fill(torch.arange(T) > torch.arange(B)[:, None], -100)


def flat(**options: Any) -> Loss:
    return lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten(), **options)


def masked(x: Tensor, y: Tensor) -> Tensor:
    mask = (y >= 0).to(x.dtype)
    return (x.square().sum(-1) * mask).sum() / mask.sum()


def masked_in_place(x: Tensor, y: Tensor) -> Tensor:
    loss = (x.square().sum(-1) * (y >= 0)).sum()
    loss /= (y >= 0).sum().clamp(min=1)
    loss += 0.5
    return loss


def masked_by_a_sum_of_counts(x: Tensor, y: Tensor) -> Tensor:
    count = (y >= 0).sum()
    count += (y == 0).sum()
    return x.square().sum() / count


def shared_out(x: Tensor, y: Tensor) -> Tensor:
    """The denominator meets rows, not a scalar."""
    return (x.square() * (y >= 0)[..., None] / (y >= 0).sum()).sum()


def in_states_of_a_metric(x: Tensor, y: Tensor) -> Tensor:
    total, count = torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=torch.long)
    total += (x.square().sum(-1) * (y >= 0)).sum()
    count += (y >= 0).sum()
    return total / count


def without_dividing_by_zero(x: Tensor, y: Tensor) -> Tensor:
    total, count = (x.square().sum(-1) * (y >= 1)).sum(), (y >= 1).sum()
    is_zero = count == 0
    safe = torch.where(is_zero, torch.ones_like(count), count)
    return torch.where(is_zero, torch.zeros_like(total), total / safe)


LOSSES: dict[str, Loss] = {
    "masked mean in the states of a metric": in_states_of_a_metric,
    "masked mean without dividing by zero": without_dividing_by_zero,
    "cross entropy, ignored labels": flat(),
    "cross entropy of axes": lambda x, y: F.cross_entropy(x.mT, y),
    "cross entropy of a module": lambda x, y: nn.CrossEntropyLoss(weight=WEIGHT)(x.flatten(0, 1), y.flatten()),
    "cross entropy, smoothed": flat(weight=WEIGHT, label_smoothing=0.1),
    "cross entropy, summed": flat(reduction="sum"),
    "cross entropy of probabilities": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), x.detach().softmax(-1).flatten(0, 1)
    ),
    "likelihood": lambda x, y: F.nll_loss(x.log_softmax(-1).flatten(0, 1), y.flatten(), WEIGHT),
    "squares": lambda x, y: F.mse_loss(x, torch.zeros_like(x)) / y.ge(0).sum(),
    "divergence": lambda x, y: F.kl_div(x.log_softmax(-1), torch.full_like(x, 1 / C), reduction="batchmean"),
    "masked mean": masked,
    "masked mean in place": masked_in_place,
    "masked mean by a sum of counts": masked_by_a_sum_of_counts,
    "masked mean, shared out": shared_out,
    "masked mean by a count": lambda x, y: x.square().sum() / (y >= 0).count_nonzero(),
    "root of a mean": lambda x, y: (x.square().mean() + 1e-3).sqrt(),
    "two terms": lambda x, y: flat()(x, y) + 0.1 * masked(x, y),
    "two terms in a stack": lambda x, y: (torch.stack([flat()(x, y), masked(x, y)]) * WEIGHT[:2]).square().sum(),
    "sum over all axes by name": lambda x, y: x.square().sum((0, 1, -1)) / (y >= 0).sum(dim=(0, 1)),
    "extremes and truth values": lambda x, y: x.amax() - x.min() + (y == 0).any() * x.mean() + (y > -1).all() * x.sum(),
    "masked mean, normalised": lambda x, y: masked(x, y) / masked(x, y).detach().sqrt(),
    "a loss of shape (1,)": lambda x, y: (masked(x, y) * WEIGHT[1:2]).square().mean(),
}


@each("reduction", ["mean", "sum"])
@each("name", LOSSES)
def test_loss_of_a_batch_is_that_of_its_records(name: str, reduction: str) -> None:
    scores, labels = records()
    loss = LOSSES[name]
    scores.requires_grad_()
    with OwnLosses(B, reduction, []):
        together = loss(scores, labels)
    alone = torch.stack([loss(scores[i : i + 1], labels[i : i + 1]) for i in range(B)])
    expected = alone.mean() if reduction == "mean" else alone.sum()
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    (grad,), (expected_grad,) = (torch.autograd.grad(value, scores) for value in (together, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_a_term_without_labels_leaves_the_other_terms() -> None:
    scores, labels = records()
    scores.requires_grad_()
    labels[0] = -100

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return x.square().mean() + flat()(x, y)

    with OwnLosses(B, "mean", []):
        (grad,) = torch.autograd.grad(loss(scores, labels), scores)
    for i in range(B):
        (expected,) = torch.autograd.grad(loss(scores[i : i + 1], labels[i : i + 1]), scores)
        torch.testing.assert_close(grad[i], expected[i] / B, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cross entropy, ignored labels", "masked mean", "two terms"])
def test_a_batch_of_one_record_is_left_as_it_is(name: str) -> None:
    scores, labels = (tensor[1:2] for tensor in records())
    with OwnLosses(1, "mean", []):
        own = LOSSES[name](scores, labels)
    torch.testing.assert_close(own, LOSSES[name](scores, labels), rtol=1e-14, atol=0)


def test_constants_of_the_module_have_no_records() -> None:
    weights, buffer = torch.arange(8.0), torch.zeros(8)
    with OwnLosses(B, "mean", [weights, buffer]):
        assert float(weights.sum()) == 28.0
        assert float(weights.view(4, 2).sum()) == 28.0
        assert float(buffer.add_(torch.arange(8.0, requires_grad=True)).sum().detach()) == 28.0


def test_what_is_no_reduction_is_left_as_it_is() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    with OwnLosses(B, "mean", []):
        assert torch.equal(x.sum(1), torch.tensor([3.0, 12.0, 21.0, 30.0]))
        assert float(x[:3].sum()) == 36.0  # three rows are not those of four records
        assert float(F.mse_loss(x, x * 0, reduction="none")[0, 1]) == 1.0


def test_sums_over_batches_take_the_value_of_a_loss() -> None:
    scores, labels = records()
    total = torch.zeros((), dtype=torch.float64)
    with OwnLosses(B, "mean", []):
        loss = masked(scores, labels)
        total += loss
        assert float(loss) == float(total)
    assert float(masked(scores, labels)) != float(total)


def guarded(x: Tensor, y: Tensor) -> Tensor:
    loss = masked(x, y)
    return loss if torch.isfinite(loss) else torch.tensor(1e9, dtype=x.dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_guard_of_the_loss_sees_the_other_records(reduction: str, value: float) -> None:
    scores, labels = records()
    scores[2] = value
    scores.requires_grad_()
    with OwnLosses(B, reduction, []):
        together = guarded(scores, labels)
    (grad,) = torch.autograd.grad(together, scores)
    for i in (0, 1, 3):
        own = guarded(scores[i : i + 1], labels[i : i + 1])
        (expected,) = torch.autograd.grad(own, scores)
        torch.testing.assert_close(grad[i], expected[i] / (B if reduction == "mean" else 1), rtol=1e-12, atol=1e-12)
    assert not guarded(scores, labels).requires_grad  # the batch by itself is set to a constant


SELECTIONS: dict[str, Any] = {
    "mask": lambda x, m: x[m],
    "function": torch.masked_select,
    "positions": lambda x, m: x.flatten()[m.flatten().nonzero().squeeze(1)],
    "positions along axes": lambda x, m: x[torch.where(m)],
    "positions by a function": lambda x, m: x.flatten().index_select(0, torch.argwhere(m.flatten())[:, 0]),
    "positions that were moved": lambda x, m: x.flatten()[m.flatten().nonzero().squeeze(1).clone()],
}


@each("name", SELECTIONS)
def test_rows_selected_by_values_are_refused(name: str) -> None:
    scores, labels = records()
    with OwnLosses(B, "mean", []):
        assert len(SELECTIONS[name](labels, labels >= 0)) == 10  # no gradient flows through them
        with pytest.raises(PrivacyError, match="known by their positions under per_sample_loss=True"):
            SELECTIONS[name](scores[..., 0].requires_grad_(), labels >= 0)


@each("name", [name for name in SELECTIONS if "moved" not in name])
def test_values_that_select_all_rows_are_refused(name: str) -> None:
    """Other records may have fewer of them."""
    scores, labels = records()
    with OwnLosses(B, "mean", []), pytest.raises(PrivacyError, match="by values"):
        SELECTIONS[name](scores[..., 0].requires_grad_(), labels >= -100)


def test_rows_at_public_positions_keep_their_records() -> None:
    scores, _ = records()
    x = scores.requires_grad_().flatten(0, 1)
    with OwnLosses(B, "mean", []):
        own = x[torch.arange(B) * T].square().max()
    torch.testing.assert_close(own, scores[:, 0].square().amax(1).mean(), rtol=1e-12, atol=0)
