"""Complex parameters: rules see them as functions of their real and imaginary parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import real_view
from tests.per_sample.owners import assert_agrees
from tests.per_sample.test_following import bags_of, summed
from tests.per_sample.ways_of_use import Uses


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.cdouble, generator=torch.Generator().manual_seed(sum(shape)))


def low_frequencies(m: Any, x: Tensor) -> Tensor:
    """The layer of a Fourier neural operator, and a pointwise map."""
    spectrum = torch.fft.rfft(x, dim=1)
    kept = torch.zeros_like(spectrum)
    kept[:, :2] = torch.einsum("bti,iot->bto", spectrum[:, :2], m.w)
    return torch.fft.irfft(kept, n=4, dim=1) + m.layer(x)


def in_turns(m: Any, x: Tensor) -> Tensor:
    for turn in range(2):
        x = (x * m.w[turn]).real.tanh()
    return x


#: Functions of a module and data of shape (N, 4, 3), and what the module holds.
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "low frequencies": (low_frequencies, {"w": drawn(3, 3, 2), "layer": nn.Linear(3, 3)}),
    "product": (lambda m, x: (x.to(torch.cdouble) @ m.w).abs(), {"w": drawn(3, 2)}),
    "linear": (lambda m, x: F.linear(x.to(torch.cdouble), m.w, m.b).abs(), {"w": drawn(2, 3), "b": drawn(2)}),
    "conjugate": (lambda m, x: (x * m.w.conj() + m.w).imag, {"w": drawn(3)}),
    "parts by themselves": (lambda m, x: x * m.w.real + m.w.imag.exp(), {"w": drawn(3)}),
    "real numbers": (lambda m, x: x * torch.view_as_real(m.w).sum(-1), {"w": drawn(3)}),
    "views": (in_turns, {"w": drawn(2, 3)}),
    "two uses": (lambda m, x: (x * m.w).abs() + (x * m.w.abs()), {"w": drawn(3)}),
    "functions": (lambda m, x: (x * torch.polar(m.r.exp(), m.w.angle())).real, {"w": drawn(3), "r": drawn(3).real}),
    "a number": (lambda m, x: (x * m.w).abs() * m.v, {"w": drawn(), "v": torch.ones(3)}),
    "checkpoint": (lambda m, x: checkpoint(lambda y: (y * m.w).abs(), x, use_reentrant=False), {"w": drawn(3)}),
}


@pytest.mark.parametrize("way", WAYS)
def test_complex_parameters_agree_with_batches_of_one(way: str) -> None:
    module, data = Uses(WAYS[way][0], **WAYS[way][1]), torch.stack([bag[0] for bag in bags_of(4, 3)])
    engine = assert_agrees(module, lambda x: module(x).square().sum((1, 2)), lambda chosen: data[chosen])
    assert not engine.follows_owners


@pytest.mark.parametrize("way", WAYS)
def test_complex_parameters_agree_on_owned_rows(way: str) -> None:
    module, bags = Uses(WAYS[way][0], **WAYS[way][1]), bags_of(4, 3)
    engine = assert_agrees(
        module, lambda batch: summed(module(torch.cat(batch)), batch), lambda chosen: [bags[i] for i in chosen]
    )
    assert engine.follows_owners


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return 1j * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return -1j * grads[0]


def test_an_autograd_function_of_a_complex_weight_is_refused() -> None:
    module, data = (
        Uses(lambda m, x: (x * Turned.apply(m.w)).abs(), w=drawn(3)),
        torch.stack([b[0] for b in bags_of(4, 3)]),
    )  # type: ignore[no-untyped-call]
    with pytest.raises(PrivacyError, match=r"torch.autograd.Function Turned, which hides"):
        assert_agrees(module, lambda x: module(x).square().sum((1, 2)), lambda chosen: data[chosen])
    assert real_view(module.w.detach()).shape == (3, 2)
