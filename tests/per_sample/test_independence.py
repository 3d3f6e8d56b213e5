"""The comparison with samples run alone, and the search for layers that cannot be private."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.independence import compare_with_singles, find_unsupported
from lightning_dp.step.module_checks import check_layers
from tests import reference
from tests.cases import each

Losses = Callable[[nn.Module, Tensor], Tensor]


def batched_gradients(module: nn.Module, loss: Tensor, backprop_of: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return what an engine would: the gradient that flows through sample i's rows of a linear model's output."""
    out = backprop_of()
    (backprop,) = torch.autograd.grad(loss, out)
    return {"weight": torch.einsum("bo,bi->boi", backprop, module.seen), "bias": backprop}


class Recorded(nn.Linear):
    """A linear layer that remembers its input and output, enough for per-sample gradients by hand."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.out = x, super().forward(x)
        return self.out


def gradients_of(loss_of: Losses, batch_size: int = 4) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return per-sample gradients of the batch (loss times batch size) and of each sample alone."""
    torch.manual_seed(0)
    layer = Recorded(3, 5, dtype=torch.float64)
    x = torch.randn(batch_size, 3, dtype=torch.float64) * torch.arange(1, batch_size + 1)[:, None]
    loss = loss_of(layer, x) * batch_size
    batched = batched_gradients(layer, loss, lambda: layer.out)
    return batched, reference.single_gradients(layer, lambda i: loss_of(layer, x[i : i + 1]), batch_size)


def mean_loss(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).tanh().square().sum(1).mean()


def sum_loss(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).tanh().square().sum()


def twice_divided_loss(layer: nn.Module, x: Tensor) -> Tensor:
    return mean_loss(layer, x) / len(x)


def weighted_loss(layer: nn.Module, x: Tensor) -> Tensor:
    losses, weights = layer(x).tanh().square().sum(1), x.detach()[:, 0].abs()
    return (losses * weights).sum() / weights.sum()


def two_terms_loss(layer: nn.Module, x: Tensor) -> Tensor:
    """A mean over the samples, and one over some of them, as over known labels."""
    out, known = layer(x), x.detach()[:, 0] > 0
    return out.tanh().square().sum(1).mean() + (out.sin().sum(1) * known).sum() / known.sum().clamp(min=1)


def contrastive_loss(layer: nn.Module, x: Tensor) -> Tensor:
    out = F.normalize(layer(x))
    return F.cross_entropy(out @ out.T.detach() + 0.1 * layer.out.sum(1, keepdim=True), torch.arange(len(x)))


def normalized_loss(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x)
    return (out - out.mean(0)).tanh().square().sum(1).mean() + 0.01 * out.square().sum(1).mean()


def squared_loss(layer: nn.Module, x: Tensor) -> Tensor:
    """The square of a mean, less a value between those of the samples."""
    return (mean_loss(layer, x) - 1.9).square()


def logarithm_loss(layer: nn.Module, x: Tensor) -> Tensor:
    """The logarithm of a mean, whose derivative has one sign."""
    return mean_loss(layer, x).log()


def window_loss(layer: nn.Module, x: Tensor) -> Tensor:
    """A mean over rows drawn from the whole batch, here always from its middle."""
    return layer(x).tanh().square().sum(1)[len(x) // 2 :][:1].mean()


def counted_loss(layer: nn.Module, x: Tensor) -> Tensor:
    """Weights of positive samples from a count of the others, of which a sample alone has none."""
    positive = x.detach()[:, 0] > 0
    weight = (~positive).sum() / positive.sum()
    return (layer(x).square().sum(1) * torch.where(positive, weight, 1.0)).mean()


def test_compare_accepts_a_mean_over_samples() -> None:
    compare_with_singles(*gradients_of(mean_loss))


@pytest.mark.parametrize(
    ("loss_of", "cause"),
    [
        (sum_loss, r"All gradients are 4 times as large, and the batch has 4 samples: the loss is a sum"),
        (twice_divided_loss, r"All gradients are 0\.25 times as large \(batch of 4\): the loss is divided"),
        (weighted_loss, r"a factor of its own, from 0\.\d+ to \d\.\d+: samples share a denominator"),
        (squared_loss, r"from -\d+\.\d+ to \d+\.\d+: the step trains a function of the whole batch's loss"),
        (logarithm_loss, r"samples share a denominator or another function.*square or logarithm of the batch's loss"),
        (window_loss, r"3 of 4 samples have a gradient when run alone and none in the batch.*random windows"),
        (counted_loss, r"\d of 4 samples have a gradient in the batch and none when run alone.*such as pos_weight"),
        (contrastive_loss, r"No factor per sample explains it.*attention.*padding to the longest sample that no"),
        (two_terms_loss, r"No factor per sample explains it.*a mean over known labels.*per_sample_loss=True"),
        (normalized_loss, r"No factor per sample explains it: samples influence each other"),
    ],
)
def test_compare_names_the_cause_of_a_difference(loss_of: Losses, cause: str) -> None:
    with pytest.raises(PrivacyError, match=cause):
        compare_with_singles(*gradients_of(loss_of))


def test_frozen_batch_norm_is_sent_to_evaluation_mode() -> None:
    teacher = nn.BatchNorm1d(3).requires_grad_(False)
    ((_, _, why),) = find_unsupported(teacher)
    assert why.endswith("its weights are frozen, so call its eval() in on_train_start.")
    assert not find_unsupported(teacher.eval())
    assert "fix(module)" in find_unsupported(nn.BatchNorm1d(3, affine=False))[0][2]
    with pytest.raises(PrivacyError, match=r"in on_train_start\.$"):
        check_layers(teacher.train(), runs_samples_alone=False)


def test_compare_names_the_worst_parameters_and_suspects() -> None:
    torch.manual_seed(0)
    batched = {name: torch.randn(2, 3) for name in "abcdef"}
    singles = [{name: grads[i].clone() for name, grads in batched.items()} for i in range(2)]
    largest = max(torch.cat([*single.values()]).norm().item() for single in singles)
    singles[0]["b"][0] += 0.5 * largest
    singles[1]["e"][0] += 0.7 * largest
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(PrivacyError, match=r"in e \(0\.\d+, sample 1\), b \(0\.\d+, sample 0\)\.") as caught:
        compare_with_singles(batched, singles, module=module)
    assert "Found in the module: 1: BatchNorm1d normalises" in str(caught.value)
    with pytest.raises(PrivacyError, match="samples influence each other") as caught:
        compare_with_singles(batched, singles)
    assert "Found in the module" not in str(caught.value)


@pytest.mark.parametrize("rtol", [1e-6, 1e-3, 5e-2])
def test_compare_tolerance_is_relative_to_the_largest_gradient(rtol: float) -> None:
    # sample 1 has the largest norm, 5, over two parameters; the difference is put into sample 0
    batched = {"a": torch.tensor([[1.0], [3.0]]).double(), "b": torch.tensor([[1.0], [4.0]]).double()}
    for share, differs in ((0.8, False), (1.2, True)):
        singles = [{name: grads[i].clone() for name, grads in batched.items()} for i in range(2)]
        singles[0]["a"] += share * 5 * rtol
        if differs:
            with pytest.raises(PrivacyError, match=r"in a \(\S+, sample 0\)"):
                compare_with_singles(batched, singles, rtol=rtol)
        else:
            compare_with_singles(batched, singles, rtol=rtol)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_compare_of_non_finite_gradients(bad: float) -> None:
    grads = torch.ones(3, 2)
    grads[1, 0] = bad
    finite = [{"w": torch.ones(2)} for _ in range(3)]
    with pytest.raises(PrivacyError, match=r"in w \(inf, sample 1\)"):
        compare_with_singles({"w": grads}, finite)
    with pytest.raises(
        PrivacyError, match=r"in w \(inf, sample 1\).* 1 of 3 samples have no finite gradient when run alone"
    ):
        compare_with_singles({"w": torch.ones(3, 2)}, [{"w": row} for row in grads])
    compare_with_singles({"w": grads}, [{"w": row} for row in grads])
    with pytest.raises(PrivacyError, match="at least one sample with a finite gradient"):
        compare_with_singles({"w": grads[1:2]}, [{"w": grads[1]}])
    moved = torch.ones(3, 2)
    moved[1, 0], moved[2, 0] = bad, 2.0
    with pytest.raises(PrivacyError, match=r"in w \(0.\d+, sample 2\)"):
        compare_with_singles({"w": moved}, [{"w": row} for row in grads])


def test_compare_takes_an_absent_parameter_for_zero() -> None:
    compare_with_singles({"w": torch.ones(2, 3), "unused": torch.zeros(2, 4)}, [{"w": torch.ones(3)}] * 2)
    compare_with_singles({"w": torch.ones(2, 3)}, [{"w": torch.ones(3), "unused": torch.zeros(4)}] * 2)
    compare_with_singles({"w": torch.zeros(2, 3)}, [{"w": torch.zeros(3)}] * 2)
    with pytest.raises(PrivacyError, match="in w "):
        compare_with_singles({}, [{"w": torch.ones(3)}] * 2)
    with pytest.raises(PrivacyError, match="in w "):
        compare_with_singles({"w": torch.ones(2, 3)}, [{"w": torch.zeros(3)}] * 2)
    compare_with_singles({"w": torch.zeros(0, 3)}, [])


def test_compare_refuses_arguments_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"Expected batched\['w'\] of shape \(2, 3\) for 2 singles, got shape=\(4, 3\)"
    ):
        compare_with_singles({"w": torch.ones(4, 3)}, [{"w": torch.ones(3)}] * 2)
    for rtol in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Expected 0 < rtol < inf"):
            compare_with_singles({"w": torch.ones(1, 3)}, [{"w": torch.ones(3)}], rtol=rtol)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", amount=0.5)
    return module


UNSUPPORTED = [
    (nn.BatchNorm1d(3), "statistics of the batch"),
    (nn.BatchNorm2d(3).eval(), "statistics of the batch"),
    (nn.BatchNorm2d(3, affine=False), "statistics of the batch"),
    (frozen(nn.BatchNorm2d(3, track_running_stats=False)), "statistics of the batch"),
    (nn.SyncBatchNorm(3), "lightning_dp.fix"),
    (nn.InstanceNorm2d(3, track_running_stats=True), "without noise"),
    (nn.Embedding(3, 4, max_norm=1.0), "without noise"),
    (nn.Embedding(3, 4, scale_grad_by_freq=True), "counts over the batch"),
]
SUPPORTED = [
    frozen(nn.BatchNorm2d(3)),
    nn.InstanceNorm2d(3, affine=True),
    frozen(nn.InstanceNorm2d(3, track_running_stats=True)),
    nn.GroupNorm(1, 3),
    nn.LayerNorm(3),
    nn.LSTM(3, 4),
    nn.LSTM(3, 4, proj_size=2),
    nn.GRU(3, 4),
    nn.RNN(3, 4),
    nn.MultiheadAttention(4, 2),
    nn.MultiheadAttention(4, 2, dropout=0.1),
    parametrizations.spectral_norm(nn.Linear(3, 4)),
    parametrizations.weight_norm(nn.Linear(3, 4)),
    pruned(nn.Linear(3, 4)),
    nn.Embedding(3, 4, padding_idx=0),
    nn.Conv2d(3, 4, 3),
    nn.Dropout(0.5),
]


@pytest.mark.parametrize(("layer", "why"), UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_find_unsupported_names_the_layer_and_why(layer: nn.Module, why: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"inner": layer}))
    found = find_unsupported(module)
    assert [(name, each) for name, each, _ in found] == [("1.inner", layer)]
    assert found[0][2].startswith(type(layer).__name__)
    assert why in found[0][2]
    assert [name for name, _, _ in find_unsupported(layer)] == [""]


def test_find_unsupported_alone_names_only_changed_state() -> None:
    layers = nn.ModuleList(layer for layer, _ in UNSUPPORTED)
    found = find_unsupported(layers, runs_samples_alone=True)
    assert [(type(layer).__name__, "without noise" in why) for _, layer, why in found] == [
        ("BatchNorm1d", True),
        ("BatchNorm2d", True),
        ("SyncBatchNorm", True),
        ("InstanceNorm2d", True),
        ("Embedding", True),
    ]


@each("layer", SUPPORTED)
def test_find_unsupported_leaves_out_what_is_private(layer: nn.Module) -> None:
    assert find_unsupported(nn.Sequential(nn.Linear(2, 2), layer)) == []


def test_a_difference_without_a_factor_has_no_cause() -> None:
    grads = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    off = grads * torch.tensor([[1.0], [1.004]])
    with pytest.raises(
        PrivacyError, match=r"nearly agree: an operation computes with less precision .* such as a denominator"
    ) as error:
        compare_with_singles({"w": off}, [{"w": grads[0]}, {"w": grads[1]}], rtol=1e-3)
    assert "times as large" not in str(error.value)


def test_a_wrong_rule_is_told_apart_from_coupled_samples() -> None:
    grads = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    swapped, singles = {"w": grads.flip(0)}, [{"w": grads[0]}, {"w": grads[1]}]
    mixed = {"w": grads + torch.tensor([[0.1], [-0.1]])}
    with pytest.raises(PrivacyError, match=r"which is ours to mend, or .* copies of a parameter .*='single'"):
        compare_with_singles(mixed, singles, adds_up=lambda: True)
    with pytest.raises(PrivacyError, match=r"those of the records in another order. Likely cause: a collate function"):
        compare_with_singles(swapped, singles, adds_up=lambda: True)
    with pytest.raises(PrivacyError, match="samples influence each other"):
        compare_with_singles(swapped, singles, adds_up=lambda: False)
