"""Recurrent layers: torch's fused forward, and a backward through time that treats all gates as two linear layers.

With all hidden states known from the fused forward, the gates of all times are two linear layers,

    gates_x = x W_ih^T + b_ih,    gates_h = h_prev W_hh^T + b_hh,

whose per-sample gradients have a rule. The backward through time gives their backprops (through_time.py).

Shape legend: ``B`` samples, ``T`` times, ``H`` hidden features, ``P`` features of the output (``H`` without
projection).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import fused_kernel, unfollowed, unreported
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.owners.owned import Rows
from lightning_dp.per_sample.tracking.recurrent_starts import hold_no_data, of_constants, with_rows_of
from lightning_dp.per_sample.tracking.through_time import ThroughTime, cells_of

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker

ORDERS = WeakTensorKeyDictionary()
"""``batch_sizes`` of a packed sequence to its ``sorted_indices``, noted when a recurrent layer of torch runs."""

_PLAIN = {kind: kind.forward for kind in (nn.RNN, nn.LSTM, nn.GRU)}
_watching = 0


def watch_order(*, on: bool) -> None:
    """Let the recurrent layers of torch note in which order a packed sequence holds the samples, until switched off.

    Their ``forward`` is replaced on the class: a subclass may call it as ``super().forward``, without any hook.
    """
    global _watching
    before, _watching = _watching, _watching + (1 if on else -1)
    if not before or not _watching:
        for kind, forward in _PLAIN.items():
            kind.forward = _NOTING[kind] if on else forward  # type: ignore[method-assign]


def _noting(forward: Any) -> Any:
    @functools.wraps(forward)
    def noted(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, PackedSequence):
            ORDERS[input.batch_sizes] = input.sorted_indices
        return forward(self, input, *args, **kwargs)

    return noted


_NOTING = {kind: _noting(forward) for kind, forward in _PLAIN.items()}


class Weights(NamedTuple):
    """Weights of one layer in one direction."""

    ih: Any
    hh: Any
    b_ih: Any
    b_hh: Any
    hr: Any


def _run_layer(
    tracker: Tracker, kind: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """Run one layer in one direction over ``(B, T, features)``; return outputs and, for an LSTM, cells."""
    if hold_no_data(tracker, x, h0, c0):
        return of_constants(tracker, kind, x, h0, c0, weights)
    if tracker.follower is not None:
        h0, c0 = with_rows_of(tracker, x, h0), None if c0 is None else with_rows_of(tracker, x, c0)
        x = _with_owners_of_states(tracker, kind, x, h0, c0)
    plain = [weight.detach() for weight in weights if weight is not None]
    options = (weights.b_ih is not None, 1, 0.0, False, False, True)
    fused = fused_kernel(kind)
    with torch.no_grad(), unfollowed():
        state = h0.unsqueeze(0).detach() if c0 is None else (h0.unsqueeze(0).detach(), c0.unsqueeze(0).detach())
        out = fused(x.detach(), state, plain, *options)[0]
        before = torch.cat([h0.detach().unsqueeze(1), out[:, :-1]], 1)
    _hand_on(tracker, x, before)
    gates_x = F.linear(x, weights.ih, weights.b_ih)
    gates_h = F.linear(before, weights.hh, weights.b_hh)
    projected = None
    if weights.hr is not None:
        assert c0 is not None
        with unfollowed():
            i, f, g, o = (gates_x.detach() + gates_h.detach()).chunk(4, -1)
            hidden = o.sigmoid() * cells_of(f.sigmoid(), i.sigmoid() * g.tanh(), c0.detach()).tanh()
        _hand_on(tracker, x, hidden)
        projected = F.linear(hidden, weights.hr)
    hr = None if weights.hr is None else weights.hr.detach()
    hh = weights.hh.detach()
    with unfollowed():
        outputs: tuple[Tensor, Tensor | None] = ThroughTime.apply(  # type: ignore[no-untyped-call]
            gates_x, gates_h, projected, h0, c0, kind, out, hh, hr
        )
    _hand_on(tracker, x, *outputs)
    return outputs


def _with_owners_of_states(tracker: Tracker, kind: str, x: Tensor, h0: Tensor, c0: Tensor | None) -> Tensor:
    """Return the inputs with the owners of their sequences; inputs that hold no data are those of whom the states
    belong to.
    """
    follower = tracker.follower
    assert follower is not None
    given, x = [x, h0.unsqueeze(1), None if c0 is None else c0.unsqueeze(1)], x.view_as(x)
    follower.hand_on(given, [x])
    owners = follower.owners_of(x)
    if isinstance(owners, Rows) and owners.axis not in (0, None):
        raise PrivacyError(
            f"Expected each sequence of {kind} to belong to one sample, got rows of several samples in one. "
            f"Give every sample a sequence of its own; {WAY_OUT}."
        )
    return x


def _hand_on(tracker: Tracker, sequences: Tensor, *results: Tensor | None) -> None:
    """Give the owners of sequences to results that were computed sequence by sequence."""
    if tracker.follower is not None:
        tracker.follower.hand_on([sequences], results)


def _by_sequence(tracker: Tracker, how: Callable[..., Tensor], sequences: Tensor, *others: Any) -> Tensor:
    """Run a function that computes every sequence on its own, as one step if the owners of rows are followed."""
    if tracker.follower is None or not isinstance(tracker.follower.owners_of(sequences), Rows):
        return how(sequences, *others)
    with unfollowed():
        out = how(sequences, *others)
    _hand_on(tracker, sequences, out)
    return out


def _turned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return sequences ``(B, T, ...)`` in reverse order, each within its own length."""
    if lengths is None:
        return x.flip(1)
    times = torch.arange(x.shape[1], device=x.device)
    index = torch.where(times < lengths[:, None], lengths[:, None] - 1 - times, times)
    return x.gather(1, index.unsqueeze(2).expand(x.shape))


def _last(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return sequence[:, -1]
    return sequence[torch.arange(len(sequence), device=sequence.device), lengths - 1]


def recurrent(tracker: Tracker, func: Any, *args: Any) -> Any:
    """Run ``torch.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu`` on padded or packed sequences."""
    kind = func.__name__
    if not any(weight.requires_grad for part in args if isinstance(part, (list, tuple)) for weight in part):
        with unreported():
            return func(*args)
    packed = isinstance(args[3], (list, tuple))
    lengths = order = None
    if packed:
        data, batch_sizes, state, flat, has_biases, num_layers, dropout, train, bidirectional = args
        if tracker.follower is None:  # else owners of rows are followed, in any order
            if batch_sizes not in ORDERS:
                raise PrivacyError(
                    f"Expected packed sequences in calls of nn.LSTM, nn.GRU and nn.RNN only, got a direct call of "
                    f"{kind}, which does not show the order of the samples. {WAY_OUT}."
                )
            order = ORDERS[batch_sizes]
        x, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes), batch_first=True)
        if order is not None:
            back = order.argsort()
            x, lengths = x.index_select(0, back), lengths.index_select(0, back.cpu())
        lengths = lengths.to(x.device)
        batch_first = True
    else:
        x, state, flat, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        x = x if batch_first else x.transpose(0, 1)
    states = [state] if isinstance(state, Tensor) else [*state]
    if order is not None:
        states = [one.index_select(1, order.argsort()) for one in states]
    per_layer = len(flat) // (num_layers * (1 + bidirectional))
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outs = []
        for direction in range(1 + bidirectional):
            index = layer * (1 + bidirectional) + direction
            own = [*flat[index * per_layer : (index + 1) * per_layer]]
            hr = own.pop() if per_layer in (3, 5) else None
            b_ih, b_hh = own[2:] if has_biases else (None, None)
            weights = Weights(own[0], own[1], b_ih, b_hh, hr)
            initial = [one[index] for one in states]
            given = _by_sequence(tracker, _turned, x, lengths) if direction else x
            out, cells = _run_layer(tracker, kind, given, initial[0], initial[1] if len(initial) > 1 else None, weights)
            last[0].append(_by_sequence(tracker, _last, out, lengths))
            if cells is not None:
                last[1].append(_by_sequence(tracker, _last, cells, lengths))
            outs.append(_by_sequence(tracker, _turned, out, lengths) if direction else out)
        x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        if dropout and train and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    finals = [each[0].unsqueeze(0) if len(each) == 1 else torch.stack(each) for each in last]
    if not packed:
        return (x if batch_first else x.transpose(0, 1), *finals)
    assert lengths is not None
    if order is not None:
        x, lengths = x.index_select(0, order), lengths.index_select(0, order)
        finals = [final.index_select(1, order) for final in finals]
    return (pack_padded_sequence(x, lengths.cpu(), batch_first=True).data, *finals)
