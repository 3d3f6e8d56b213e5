"""The backward through time of recurrent layers: from the gradients of outputs to those of all gates.

It needs a few elementwise operations and one product with ``W_hh`` for each time.

Shape legend: ``B`` samples, ``T`` times, ``H`` hidden features, ``P`` features of the output (``H`` without
projection).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.layout import TWICE


class ThroughTime(torch.autograd.Function):
    """The backward through time of one layer in one direction; its forward passes on the outputs of the fused
    kernel.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        gates_x: Tensor,
        gates_h: Tensor,
        projected: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        kind: str,
        out: Tensor,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
    ) -> Any:
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        if kind == "lstm":
            assert c0 is not None
            i, f, g, o = (gates_x + gates_h).chunk(4, -1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cells = cells_of(f, i * g, c0)
            ctx.save_for_backward(h0, c0, cells, i, f, g, o, weight_hh, weight_hr)
            return out, cells
        if kind == "gru":
            ctx.save_for_backward(gates_x, gates_h, h0, out, weight_hh)
        else:
            ctx.save_for_backward(out, weight_hh)
        return out, None

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise PrivacyError(
                f"Expected a backward without create_graph, {TWICE} a recurrent layer of torch. Second derivatives of "
                "such layers need grad_sample='single'."
            )
        backward: Any = {"lstm": _lstm_backward, "gru": _gru_backward}.get(ctx.kind, _rnn_backward)
        gates_x, gates_h, projected, h0, c0 = backward(ctx, *grads)
        return gates_x, gates_h, projected, h0, c0, None, None, None, None


def cells_of(forget: Tensor, new: Tensor, cell: Tensor) -> Tensor:
    """Return ``c_t = f_t c_{t-1} + new_t`` for all times, shape ``(B, T, H)``."""
    cells = torch.empty_like(new)
    for t in range(new.shape[1]):
        cell = torch.addcmul(new[:, t], forget[:, t], cell, out=cells[:, t])
    return cells


def _lstm_backward(ctx: Any, grad_out: Tensor | None, grad_cells: Tensor | None) -> Any:
    h0, c0, cells, i, f, g, o, weight_hh, weight_hr = ctx.saved_tensors
    size, times, hidden = cells.shape
    tanh = cells.tanh()
    before = torch.cat([c0.unsqueeze(1), cells[:, :-1]], 1)
    # gates of a time, from the gradient of its cell (i, f, g) and of its hidden state (o)
    of_cell = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], 2)
    of_hidden, to_cell = tanh * o * (1 - o), o * (1 - tanh * tanh)
    gates = cells.new_empty(size, times, 4, hidden)
    outs = None if weight_hr is None else cells.new_empty(size, times, weight_hr.shape[0])
    d_hidden: Tensor = torch.zeros_like(h0)
    d_cell = torch.zeros_like(c0)
    for t in range(times - 1, -1, -1):
        if grad_out is not None:
            d_hidden = d_hidden + grad_out[:, t]
        if grad_cells is not None:
            d_cell = d_cell + grad_cells[:, t]
        if outs is not None:
            outs[:, t] = d_hidden
            d_hidden = d_hidden @ weight_hr
        d_cell = torch.addcmul(d_cell, d_hidden, to_cell[:, t])
        torch.mul(d_cell.unsqueeze(1), of_cell[:, t], out=gates[:, t, :3])
        torch.mul(d_hidden, of_hidden[:, t], out=gates[:, t, 3])
        d_hidden = gates[:, t].flatten(1) @ weight_hh
        d_cell = d_cell * f[:, t]
    flat = gates.flatten(2)
    return flat, flat, outs, d_hidden, d_cell


def _gru_backward(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    gates_x, gates_h, h0, out, weight_hh = ctx.saved_tensors
    xr, xz, xn = gates_x.chunk(3, -1)
    hr, hz, hn = gates_h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    before = torch.cat([h0.unsqueeze(1), out[:, :-1]], 1)
    to_new = (1 - z) * (1 - n * n)
    factors = torch.stack([to_new * hn * r * (1 - r), (before - n) * z * (1 - z), to_new * r], 2)
    gates = torch.empty_like(factors)
    hidden = torch.empty_like(out)
    d_hidden = torch.zeros_like(h0)
    for t in range(out.shape[1] - 1, -1, -1):
        if grad_out is not None:
            d_hidden = d_hidden + grad_out[:, t]
        hidden[:, t] = d_hidden
        torch.mul(d_hidden.unsqueeze(1), factors[:, t], out=gates[:, t])
        d_hidden = torch.addmm(d_hidden * z[:, t], gates[:, t].flatten(1), weight_hh)
    of_input = torch.cat([gates[:, :, :2].flatten(2), hidden * to_new], 2)
    return of_input, gates.flatten(2), None, d_hidden, None


def _rnn_backward(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
    out, weight_hh = ctx.saved_tensors
    factors = 1 - out * out if ctx.kind == "rnn_tanh" else (out > 0).to(out.dtype)
    gates = torch.empty_like(out)
    d_hidden = torch.zeros_like(out[:, 0])
    for t in range(out.shape[1] - 1, -1, -1):
        if grad_out is not None:
            d_hidden = d_hidden + grad_out[:, t]
        torch.mul(d_hidden, factors[:, t], out=gates[:, t])
        d_hidden = gates[:, t] @ weight_hh
    return gates, gates, None, d_hidden, None
