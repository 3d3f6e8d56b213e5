"""Recurrent cells, written out as linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from lightning_dp.per_sample.tracking.nodes import is_tracked

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.tracker import Tracker


def _owned(tracker: Tracker, *given: Any) -> Sequence[Any]:
    """Return inputs and states; where owners are followed, those that hold no data are of whom the others belong to."""
    if tracker.follower is None:
        return given
    own = [one.view_as(one) for one in given]
    tracker.follower.hand_on(given, own)
    return own


def _of_state(tracker: Tracker, input: Any, state: Any, weight: Any, bias: Any) -> Any:
    """Return the gates of a state, whose rows have the order of those of the input, also where it is all zeros."""
    tracker.rows_like = None if is_tracked(input) else input
    try:
        return F.linear(state, weight, bias)
    finally:
        tracker.rows_like = None


def lstm_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of an LSTM."""
    input, hidden, cell = _owned(tracker, input, *hx)
    i, f, g, o = (F.linear(input, w_ih, b_ih) + _of_state(tracker, input, hidden, w_hh, b_hh)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gru_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of a GRU."""
    input, hx = _owned(tracker, input, hx)
    r, z, n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = _of_state(tracker, input, hx, w_hh, b_hh).chunk(3, -1)
    new = (n + (r + hr).sigmoid() * hn).tanh()
    return new + (z + hz).sigmoid() * (hx - new)


def rnn_cell(
    tracker: Tracker, func: Any, input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Any:
    """Compute one step of a plain recurrent network."""
    input, hx = _owned(tracker, input, hx)
    total = F.linear(input, w_ih, b_ih) + _of_state(tracker, input, hx, w_hh, b_hh)
    return total.tanh() if func.__name__ == "rnn_tanh_cell" else total.relu()
