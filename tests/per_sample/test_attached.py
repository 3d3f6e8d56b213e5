"""What an attached engine leaves behind, and what it costs."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.tracking.uses import Recorder, Use
from tests.per_sample.checks import make_engine, run_batch
from tests.per_sample.test_uses import Net, _data, _loss


def _state(module: nn.Module) -> list[Any]:
    return [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m.__dict__)) for m in module.modules()]


def test_detach_leaves_nothing_behind_and_copies_are_inert() -> None:
    module, data = Net(), _data(3)
    before, keys = _state(module), list(module.state_dict())
    engine = make_engine(module, _loss(module), data)
    engine.attach()
    engine.begin(4)
    output = module(data[:4])
    assert list(module.state_dict()) == keys
    copied = copy.deepcopy(module)
    pickled = pickle.loads(pickle.dumps(module))
    for other in (copied, pickled):
        torch.testing.assert_close(other(data[:4]), output)
        other(data[:4]).sum().backward()
        assert other.first.weight.grad is not None
    assert not engine.has_backprops(["first.weight"])
    output.sum().backward()
    assert module.first.weight.grad is None
    engine.end()
    module(data[:4]).sum().backward()
    assert module.first.weight.grad is not None
    engine.detach()
    engine.detach()
    assert _state(module) == before
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in module.parameters())


def test_evaluation_and_no_grad_do_not_record() -> None:
    module, data = Net(), _data(3)
    engine = make_engine(module, _loss(module), data)
    engine.begin(4)
    with torch.no_grad():
        assert not module(data[:3]).requires_grad
    with torch.inference_mode():
        assert not module(data[:3]).requires_grad
    assert not engine.squared_norms([["first.weight"]]).any()


def test_tapping_costs_no_weight_gradient() -> None:
    """Autograd saves no input for a weight gradient: of a first layer nothing at all."""
    module, data = nn.Linear(3, 4).double(), _data(3)
    engine = make_engine(module, _loss(module), data)
    engine.begin(6)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(data)
    assert saved == []


def _uses() -> int:
    gc.collect()
    return sum(type(thing) is Use for thing in gc.get_objects())


def test_engine_is_freed_at_the_end() -> None:
    """Also uses without a backward leave nothing behind once their graph is gone."""
    module, data = Net("no backward"), _data(3)
    engine = make_engine(module, _loss(module), data)
    before = _uses()
    run_batch(engine, _loss(module), data, 4)
    engine.squared_norms([["first.weight"]])
    assert _uses() == before + 2
    engine.end()
    assert _uses() == before


def test_attach_before_parameters_and_twice() -> None:
    module, data = Net(), _data(3)
    engine = PerSampleEngine(module)
    engine.attach()
    engine.set_parameters(dict(module.named_parameters()))
    engine.learn_layout(lambda size: module(data[:2].repeat(3, 1)[:size]))
    engine.attach()
    run_batch(engine, _loss(module), data, 4)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in module.parameters())
    assert engine.has_backprops(["first.weight"])


def test_sizes_are_those_of_the_largest_batch() -> None:
    recorder = Recorder()
    sizes = []
    for size in (4, 2, 5):
        recorder.begin(size)
        recorder.count(torch.zeros(size, 3))
        sizes.append(recorder.num_bytes)
        recorder.end()
    assert sizes == [4 * 12, 4 * 12, 5 * 12]
