"""Several backwards over gradients that are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample import engine
from lightning_dp.per_sample.tracking import uses
from tests import reference
from tests.per_sample import checks
from tests.per_sample.test_workspace import data_of, loss_of, network, nothing_is_small, sources_of

__all__ = ["nothing_is_small"]


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_backward_lets_go_of_what_a_kept_gradient_was_made_of(memory: str) -> None:
    """Inputs and backprops of layers whose gradients are kept die within the backward, the others' wait for its end."""
    module = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Tanh(), nn.Linear(30, 36)).double()
    data = data_of(6)
    made = checks.make_engine(module, loss_of(module), data, memory=memory)
    made.begin(6)
    loss_of(module)(data).sum().backward()
    weights = {"0.weight", "1.weight", "3.weight"}
    waiting = {key for source in sources_of(made) if source.uses for key in source.keys & weights}
    assert waiting == (set() if memory == "fast" else {"0.weight", "3.weight"})
    assert {key for source in sources_of(made) for key in source.memory().keys() & weights} == weights - waiting
    made.check_tracked()


@pytest.mark.parametrize("few", [0, 2**15])
def test_a_second_backward_without_retain_graph_is_refused(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single layer at the beginning saves nothing for its backward: autograd would let it pass."""
    monkeypatch.setattr(uses, "FEW", few)
    module = nn.Linear(40, 30).double()
    made = checks.make_engine(module, loss_of(module), data_of(6))
    made.begin(6)
    output = module(data_of(6)).sum()
    output.backward()
    with pytest.raises(PrivacyError, match=r"one backward through linear with 'weight', 'bias'.*retain_graph=True"):
        output.backward()


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 100.0])
def test_passes_one_after_the_other_add_up(monkeypatch: pytest.MonkeyPatch, share: float, retained: bool) -> None:
    """Forward, backward, forward, backward: a loss on real and one on fake data, each with its own backward."""
    monkeypatch.setattr(engine, "SHARE", share)
    module, data = network(), data_of(6)
    made = checks.make_engine(module, loss_of(module), data)
    names = [name for name, _ in module.named_parameters()]

    def total(x: Tensor) -> Tensor:
        return (2 if retained else 1) * loss_of(module)(x).sum() + loss_of(module)(-x).sin().sum()

    expected = reference.per_sample_gradients(module, lambda i: total(data[i : i + 1]), 6)
    made.begin(6)
    first = loss_of(module)(data).sum()
    if retained:
        first.backward(retain_graph=True)
    first.backward()
    loss_of(module)(-data).sin().sum().backward()
    made.check_tracked()
    norms = made.squared_norms([[name] for name in names])
    out = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    made.accumulate(torch.ones(len(names), 6).double(), [[name] for name in names], out)
    grads = made.per_sample_gradients()
    for row, name in enumerate(names):
        torch.testing.assert_close(grads[name], expected[name])
        torch.testing.assert_close(norms[row], expected[name].flatten(1).square().sum(1))
        torch.testing.assert_close(out[name], expected[name].sum(0))


def test_second_backward_is_allowed_where_torch_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    module, data = network(), data_of(6)
    checks.assert_engine_agrees(module, loss_of(module), data)
    made = checks.make_engine(module, loss_of(module), data)
    made.begin(6)
    loss = loss_of(module)(data).sum()
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in made.per_sample_gradients().items()}
    loss.backward()
    for name, grad in made.per_sample_gradients().items():
        torch.testing.assert_close(grad, 2 * once[name])
