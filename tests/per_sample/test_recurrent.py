"""Recurrent layers against batches of one: kinds, layers, directions, projections, batch orders, packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.rules.linear import LinearRule
from lightning_dp.per_sample.tracking import recurrent
from tests.per_sample.checks import assert_engine_agrees, make_engine, run_batch

KINDS: list[Any] = [nn.LSTM, nn.GRU, nn.RNN]
OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"batch_first": False},
    {"batch_first": True, "bias": False},
    {"batch_first": True, "num_layers": 2, "bidirectional": True},
]
DATA = torch.randn(6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outputs_of(found: Any) -> Tensor:
    """One number for each sample from all outputs, ``(B, T, features)`` and states."""
    out, states = found
    states = states if isinstance(states, tuple) else (states,)
    return out.square().flatten(1).sum(1) + sum((i + 1) * state.sin().sum((0, 2)) for i, state in enumerate(states))


def padded(module: nn.RNNBase, x: Tensor) -> Tensor:
    if module.batch_first:
        return outputs_of(module(x))
    out, states = module(x.transpose(0, 1))
    return outputs_of((out.transpose(0, 1), states))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.one_in(4)
def test_recurrent_layers_agree_with_batches_of_one(kind: Any, options: dict[str, Any], memory: str) -> None:
    torch.manual_seed(0)
    module = kind(3, 4, **options).double()
    for size in (1, 4, 6):
        engine = assert_engine_agrees(module, lambda x: padded(module, x), DATA, size=size, memory=memory)
    assert {type(source.rule) for source in engine._tracker.sources.values()} == {LinearRule}


@pytest.mark.parametrize("options", [one for one in OPTIONS if one["batch_first"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.one_in(2)
def test_packed_sequences_agree_with_batches_of_one(kind: Any, options: dict[str, Any], enforce_sorted: bool) -> None:
    """Of different lengths, in an order of the user's or of torch's."""
    torch.manual_seed(0)
    module = kind(3, 4, **options).double()
    lengths = torch.tensor([5, 5, 4, 3, 2, 1] if enforce_sorted else [2, 5, 1, 4, 5, 3])

    def loss(batch: Any) -> Tensor:
        x, given = batch
        packed = pack_padded_sequence(x, given, batch_first=True, enforce_sorted=enforce_sorted)
        out, states = module(packed)
        return outputs_of((pad_packed_sequence(out, batch_first=True)[0], states))

    def single(batch: Any) -> Tensor:
        x, given = batch
        return outputs_of(module(x[:, : int(given)]))

    # the two samples that the layout is learned from are repeated: where they must be sorted, of one length
    assert lengths[0] == lengths[1] or not enforce_sorted
    assert_engine_agrees(module, loss, (DATA, lengths), size=6, single_loss=single)


class Packing(nn.LSTM):
    """A layer that packs by itself and calls that of torch without its hooks, plain or packed."""

    def forward(self, x: Tensor, hx: Any = None, lengths: Tensor | None = None) -> Any:  # type: ignore[override]
        if lengths is None:
            return nn.LSTM.forward(self, x, hx)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, states = super().forward(packed, hx)
        return pad_packed_sequence(out, batch_first=True)[0], states


def test_subclasses_may_call_the_forward_of_torch() -> None:
    torch.manual_seed(0)
    module, lengths = Packing(3, 4, num_layers=2, batch_first=True).double(), torch.tensor([2, 5, 1, 4, 5, 3])

    def loss(batch: Any) -> Tensor:
        return outputs_of(module(batch[0], lengths=batch[1])) + outputs_of(module(batch[0]))

    def single(batch: Any) -> Tensor:
        return outputs_of(module(batch[0][:, : int(batch[1])])) + outputs_of(module(batch[0]))

    assert_engine_agrees(module, loss, (DATA, lengths), size=6, single_loss=single)


def test_layers_of_torch_get_their_forward_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_watching", 0)
    for kind, forward in recurrent._PLAIN.items():
        monkeypatch.setattr(kind, "forward", forward)
    before = nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward
    modules = [nn.LSTM(3, 4, batch_first=True) for _ in range(2)]
    engines = [make_engine(module, lambda x, m=module: padded(m, x), DATA.float()) for module in modules]
    assert (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward) == before
    for engine in engines:
        engine.begin(2)
    assert nn.LSTM.forward is not before[0]
    engines[0].end()
    assert nn.LSTM.forward is not before[0]
    engines[1].end()
    engines[1].end()
    assert (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward) == before


def test_relu_projections_and_dropout_between_layers() -> None:
    torch.manual_seed(0)
    relu = nn.RNN(3, 4, nonlinearity="relu", batch_first=True).double()
    assert_engine_agrees(relu, lambda x: padded(relu, x), DATA)
    projected = nn.LSTM(3, 4, proj_size=2, num_layers=2, bidirectional=True, batch_first=True).double()
    assert_engine_agrees(projected, lambda x: padded(projected, x), DATA)
    dropped = nn.LSTM(3, 4, num_layers=2, batch_first=True).double()
    engine = make_engine(dropped, lambda x: padded(dropped, x), DATA)
    dropped.dropout = 0.5
    engine.begin(6)
    outs = [padded(dropped, DATA).detach() for _ in range(2)]
    assert not torch.allclose(*outs)


def test_states_may_be_learned_and_handed_on() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.hidden, self.cell = (nn.Parameter(torch.randn(1, 1, 4)) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            state = (self.hidden.expand(-1, len(x), -1).contiguous(), self.cell.repeat(1, len(x), 1))
            return self.lstm(x, self.lstm(x.sin(), state)[1])

    torch.manual_seed(0)
    module = Learned().double()
    assert_engine_agrees(module, lambda x: outputs_of(module(x)), DATA)


def test_forward_is_that_of_the_fused_layer() -> None:
    for kind in KINDS:
        module = kind(3, 4, num_layers=2, batch_first=True).double()
        engine = make_engine(module, lambda x, m=module: padded(m, x), DATA)
        plain = padded(module, DATA)
        engine.begin(6)
        torch.testing.assert_close(padded(module, DATA), plain, rtol=0, atol=1e-12)
        engine.end()


def test_frozen_layers_keep_their_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.LSTM(3, 4, batch_first=True).double()
    head = nn.Linear(4, 1).double()
    both = nn.ModuleList([module, head])
    engine = make_engine(both, lambda x: head(module(x)[0]).sum((1, 2)), DATA)
    engine.begin(6)
    module.requires_grad_(False)
    out = module(DATA)[0]
    assert not out.requires_grad
    head(out).sum().backward()
    assert engine.has_backprops(["1.weight"])
    assert not engine.has_backprops([f"0.{name}" for name, _ in module.named_parameters()])


def test_a_packed_kernel_called_directly_is_refused() -> None:
    """The order of its samples is in the packed sequence, which the kernel does not get."""
    module = nn.GRU(3, 4, batch_first=True).double()

    def loss(x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([3] * len(x)), batch_first=True)
        state = x.new_zeros(1, len(x), 4)
        found = torch.gru(packed.data, packed.batch_sizes, state, list(module.parameters()), True, 1, 0.0, True, False)
        return found[1].sum((0, 2))

    with pytest.raises(PrivacyError, match=r"packed sequences in calls of nn.LSTM.*grad_sample='single'"):
        make_engine(module, loss, DATA)


def test_a_bad_sample_reaches_no_other() -> None:
    module = nn.LSTM(3, 4, batch_first=True)
    data = DATA.float().clone()
    engine = make_engine(module, lambda x: padded(module, x), data)
    data[2, 1] = torch.nan
    run_batch(engine, lambda x: padded(module, x), data, 6)
    norms = engine.squared_norms([[name for name, _ in module.named_parameters()]])
    assert norms.isfinite().tolist() == [[True, True, False, True, True, True]]
