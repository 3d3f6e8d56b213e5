"""Samples that ran one after another and are clipped together: what is read of them agrees with each alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.masks import ParameterMask
from lightning_dp.per_sample import SingleSampleEngine
from lightning_dp.per_sample.single_gradients import SingleGradients, most_kept

NUM = 4


class Halves(nn.Module):
    """Every second sample leaves a parameter out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3, sparse=True)
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, index: int) -> Tensor:
        layer = self.first if index % 2 else self.second
        return (layer(self.table(torch.tensor([index, 2 * index]))).square().sum() + 1) * (index + 1)


def _run(module: nn.Module, groups: list[list[str]], masks: dict[str, ParameterMask]) -> tuple[SingleGradients, list]:
    """Return the samples taken, and of each alone: norms, twice the active gradient, and the gradient."""
    engine = SingleSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    alone, samples = [], []
    for index in range(NUM):
        engine.begin(1)
        module(index).backward()
        out = _zeros(module, masks)
        engine.accumulate(torch.full((len(groups), 1), 2.0), groups, out, masks)
        alone.append((engine.squared_norms(groups, masks), out, engine.per_sample_gradients()))
        samples.append(engine.take())
        assert not engine.has_backprops(dict(module.named_parameters()))
        engine.end()
    return engine.taken(samples), alone


def _zeros(module: nn.Module, masks: dict[str, ParameterMask]) -> dict[str, Tensor]:
    shapes = {name: (masks[name].num_active,) if name in masks else p.shape for name, p in module.named_parameters()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("masked", [False, True])
def test_kept_samples_agree_with_each_sample_alone(masked: bool) -> None:
    torch.manual_seed(0)
    module = Halves()
    names = [name for name, _ in module.named_parameters()]
    groups = [names[:2], names[2:]]
    masks = {name: ParameterMask(torch.rand(p.shape) < 0.5) for name, p in module.named_parameters() if masked}
    kept, alone = _run(module, groups, masks)
    torch.testing.assert_close(kept.squared_norms(groups, masks), torch.cat([norms for norms, _, _ in alone], 1))
    factors, out = torch.rand(2, NUM), _zeros(module, masks)
    kept.accumulate(factors, groups, out, masks)
    for row, group in zip(factors, groups, strict=True):
        for name in group:
            expected = sum(factor / 2 * single[name] for factor, (_, single, _) in zip(row, alone, strict=True))
            torch.testing.assert_close(out[name], expected)
            torch.testing.assert_close(
                kept.per_sample_gradients([name])[name], torch.cat([grads[name] for _, _, grads in alone])
            )


def test_norm_of_a_long_gradient_follows_its_mask() -> None:
    gradients = SingleGradients({"w": nn.Parameter(torch.zeros(5000))}, [{"w": torch.full((5000,), 2.0)}, {}])
    assert gradients.squared_norms([["w"]]).tolist() == [[20000.0, 0.0]]
    masks = {"w": ParameterMask(torch.arange(5000) < 10)}
    assert gradients.squared_norms([["w"]], masks).tolist() == [[40.0, 0.0]]


def test_taken_gradients_hold_no_more_memory_than_their_own() -> None:
    weight = nn.Parameter(torch.ones(3))
    engine = SingleSampleEngine(nn.ParameterDict({"w": weight}))
    engine.attach()
    engine.set_parameters({"w": weight})
    engine.begin(1)
    torch.cat([weight, torch.zeros(1000)]).square().sum().backward()
    grad = engine.take()["w"]
    assert grad.tolist() == [2.0, 2.0, 2.0]
    assert grad.untyped_storage().nbytes() == grad.nbytes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_kept_sample_of_factor_zero_is_exactly_zero(bad: float) -> None:
    samples = [{"w": torch.full((3,), value)} for value in (1.0, bad, 2.0)]
    kept = SingleGradients({"w": nn.Parameter(torch.zeros(3))}, samples)
    assert kept.squared_norms([["w"]]).isfinite().tolist() == [[True, False, True]]
    out = {"w": torch.ones(3)}
    kept.accumulate(torch.tensor([[1.0, 0.0, 1.0]]), [["w"]], out)
    assert torch.equal(out["w"], torch.full((3,), 4.0))


def test_large_gradients_are_clipped_one_by_one() -> None:
    assert most_kept([torch.empty(10)]) == 64
    assert most_kept([torch.empty(2**20), torch.empty(1)]) == 1
    engine = SingleSampleEngine(nn.Linear(2, 1))
    engine.set_parameters({"weight": nn.Parameter(torch.empty(2**21, device="meta"))})
    assert engine.most_kept == 1


@pytest.mark.parametrize("few", [True, False], ids=["few rows", "most rows"])
def test_large_tables_add_rows_that_are_not_zero(few: bool) -> None:
    """Also in sums of another type, and under a mask; a sample that is not finite adds nothing."""
    rows = torch.arange(0, 2**13, 100 if few else 1)
    samples = [{"table": torch.zeros(2**13, 64), "bias": torch.ones(3)} for _ in range(3)]
    for number, sample in enumerate(samples):
        sample["table"][rows] = torch.randn(len(rows), 64)
        sample["table"][number] = torch.tensor([0.0, torch.inf, 1.0][number])
    parameters = {name: nn.Parameter(torch.zeros_like(grad)) for name, grad in samples[0].items()}
    gradients, groups = SingleGradients(parameters, samples), [["table"], ["bias"]]
    norms = torch.tensor([[float(s[n].double().norm() ** 2) for s in samples] for (n,) in groups])
    torch.testing.assert_close(gradients.squared_norms(groups), norms)
    for dtype in (torch.float32, torch.float64):
        out = {name: torch.ones_like(each, dtype=dtype) for name, each in parameters.items()}
        gradients.accumulate(torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 1.0]]), groups, out)
        expected = 1 + 0.5 * samples[0]["table"].to(dtype) + 2 * samples[2]["table"].to(dtype)
        torch.testing.assert_close(out["table"], expected)
        assert out["bias"].tolist() == [4.0, 4.0, 4.0]
    active = torch.rand(2**13, 64) < 0.5
    out["table"] = torch.ones(int(active.sum()))
    gradients.accumulate(torch.tensor([[0.5, 0.0, 2.0]]), groups[:1], out, {"table": ParameterMask(active)})
    torch.testing.assert_close(out["table"], expected[active].float())
