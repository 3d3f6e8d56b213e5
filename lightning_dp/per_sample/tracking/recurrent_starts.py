"""Recurrent layers on inputs without data: functions of parameters, or rows of zeros with which a loop starts.

The rows of zeros with which Set2Set starts say nothing about their owners, where these are followed. The results of a
layer for such rows are functions of its parameters. They get their owners where they meet data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dp.per_sample.owners.owned import Rows
from lightning_dp.per_sample.tracking import cells
from lightning_dp.per_sample.tracking.nodes import is_tracked

if TYPE_CHECKING:
    from lightning_dp.per_sample.tracking.recurrent import Weights
    from lightning_dp.per_sample.tracking.tracker import Tracker

_CELLS = {"gru": (cells.gru_cell, torch.gru_cell)}
_CELLS |= {"rnn_tanh": (cells.rnn_cell, torch.rnn_tanh_cell), "rnn_relu": (cells.rnn_cell, torch.rnn_relu_cell)}


def hold_no_data(tracker: Tracker, *given: Tensor | None) -> bool:
    """Tell whether inputs and states of a layer are constants or functions of parameters; without owners, whether its
    inputs are such functions.
    """
    follower = tracker.follower
    if follower is None:
        return is_tracked(given[0])
    return all(one is None or follower.owners_of(one) is None for one in given)


def of_constants(
    tracker: Tracker, kind: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """Run one layer, cell by cell, on inputs and states without data; return outputs and, for an LSTM, cells.

    If all rows are alike, the results are those of one row, which they repeat.

    Args:
        tracker: follows the parameters.
        kind: of the layer.
        x: inputs, ``(B, T, features)``.
        h0: hidden states, ``(B, features)``.
        c0: cells of an LSTM.
        weights: of the layer.
    """
    num = len(x)
    repeats = tracker.follower is not None and num > 1 and all(one is None or _is_one_row(one) for one in (x, h0, c0))
    if repeats:
        x, h0, c0 = x[:1], h0[:1], None if c0 is None else c0[:1]
    own = weights.ih, weights.hh, weights.b_ih, weights.b_hh
    made: list[list[Tensor]] = [[], []]
    for now in x.unbind(1):
        if c0 is None:
            cell, func = _CELLS[kind]
            h0 = cell(tracker, func, now, h0, *own)
        else:
            h0, c0 = cells.lstm_cell(tracker, torch.lstm_cell, now, (h0, c0), *own)
            h0 = h0 if weights.hr is None else F.linear(h0, weights.hr)
            made[1].append(c0)
        made[0].append(h0)
    out, last = (torch.stack(each, 1) if each else None for each in made)
    assert out is not None
    if not repeats:
        return out, last
    return _repeated(out, num), None if last is None else _repeated(last, num)


def _is_one_row(tensor: Tensor) -> bool:
    return tensor.stride(0) == 0 or (not is_tracked(tensor) and bool((tensor == tensor[:1]).all()))


def _repeated(one: Tensor, num: int) -> Tensor:
    return one.broadcast_to((num, *one.shape[1:]))  # ``expand`` would be one copy for each sample, in their order


def with_rows_of(tracker: Tracker, x: Tensor, state: Tensor) -> Tensor:
    """Return the state of a layer; of a function of parameters, copies for the samples that own the inputs' rows."""
    assert tracker.follower is not None
    rows = tracker.follower.owners_of(x)
    if not is_tracked(state) or not isinstance(rows, Rows):
        return state
    nothing = torch.zeros_like(x[:, 0, :1])
    tracker.follower.note(nothing, rows)
    return state + nothing
