"""One comparison for all: everything the engine returns against a loop over batches of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.per_sample import PerSampleEngine
from tests import reference

Loss = Callable[[Any], Tensor]


def stack(data: Any, indices: list[int]) -> Any:
    """A batch of these samples, batch axis first."""
    if isinstance(data, tuple):
        return tuple(part[indices] for part in data)
    return data[indices]


def make_engine(
    module: nn.Module,
    loss: Loss,
    data: Any,
    *,
    names: list[str] | None = None,
    with_backward: bool = False,
    **options: Any,
) -> PerSampleEngine:
    """An attached engine that has learned the layout as the strategy does: two samples, repeated."""

    def run(size: int) -> None:
        value = loss(stack(data, ([0, 1] * size)[:size]))
        if with_backward:
            value.sum().backward()

    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and (names is None or n in names)}
    engine = PerSampleEngine(module, **options)
    engine.attach()
    engine.set_parameters(parameters)
    engine.learn_layout(run)
    module.zero_grad()
    return engine


def run_batch(engine: PerSampleEngine, loss: Loss, data: Any, size: int) -> None:
    """One microbatch of the first samples, up to and with its check."""
    engine.begin(size)
    value = loss(stack(data, list(range(size)))).sum()
    if value.requires_grad:
        value.backward()
    engine.check_tracked()


def assert_engine_agrees(
    module: nn.Module,
    loss: Loss,
    data: Any,
    *,
    names: list[str] | None = None,
    size: int = 5,
    rtol: float = 1e-9,
    single_loss: Loss | None = None,
    **options: Any,
) -> PerSampleEngine:
    """Per-sample gradients, norms, weighted sums and masks of the engine equal those of batches of one.

    ``loss(batch)`` gives the losses of the samples, or their sum; ``single_loss`` the same for the batch of one, where
    that cannot be had in the same way.
    """
    assert module.training or options.pop("evaluation", False)
    if names is None:
        names = [name for name, p in module.named_parameters() if p.requires_grad]
    expected = reference.per_sample_gradients(module, lambda i: (single_loss or loss)(stack(data, [i])).sum(), size)
    expected = {name: expected[name] for name in names}
    keys = list(module.state_dict())
    engine = make_engine(module, loss, data, names=names, **options)
    for repeat in range(2):
        run_batch(engine, loss, data, size)
        assert all(p.grad is None for n, p in module.named_parameters() if n in names)
        assert list(module.state_dict()) == keys
        groups = [names, *[[name] for name in names]]
        masks = {
            name: torch.rand(g.shape[1:], generator=torch.Generator().manual_seed(7)) < 0.5
            for name, g in expected.items()
        }
        scale = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=1.0)
        factors = torch.linspace(0.1, 1.0, size, dtype=torch.float64).repeat(len(names), 1)
        factors[0, size // 2 :] = 0
        singles = [[name] for name in names]
        order = ("norms", "sums", "grads") if repeat else ("grads", "norms", "sums")
        for what in order:
            for mask in (None, masks):
                kept = {n: g if mask is None else g * mask[n] for n, g in expected.items()}
                if what == "grads":
                    grads = engine.per_sample_gradients(names, mask)
                    for name in names:
                        assert_close(grads[name], kept[name], scale, rtol, name)
                elif what == "norms":
                    true = reference.squared_norms(expected, groups, mask)
                    largest = float(true.max()) if true.numel() else 1.0
                    assert_close(engine.squared_norms(groups, mask), true, largest, rtol, "norms")
                else:
                    out = {n: torch.ones(g.shape[1:], dtype=g.dtype) for n, g in expected.items()}
                    engine.accumulate(factors.to(next(iter(out.values())).dtype), singles, out, mask)
                    for row, name in enumerate(names):
                        total = torch.tensordot(factors[row].to(kept[name].dtype), kept[name], dims=1)
                        assert_close(out[name] - 1, total, scale, rtol, name)
                    if mask is None:
                        continue
                    places = {n: m.flatten().nonzero().squeeze(1) for n, m in mask.items()}
                    rows = {n: torch.ones(len(p), dtype=out[n].dtype) for n, p in places.items()}
                    room = {n: torch.full_like(total, torch.nan) for n, total in out.items()} if repeat else None
                    engine.accumulate(factors.to(next(iter(out.values())).dtype), singles, rows, mask, places, room)
                    # a single parameter may have had its active entries picked
                    assert (
                        room is None or len(names) == 1 or any(not bool(used.isnan().any()) for used in room.values())
                    )
                    for name in names:
                        assert_close(rows[name], out[name].flatten()[places[name]], scale, rtol, name)
        engine.end()
    return engine


def assert_close(got: Tensor, expected: Tensor, scale: float, rtol: float, what: str) -> None:
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    assert got.dtype == expected.dtype, (what, got.dtype)
    if got.numel():
        worst = float((got - expected).abs().max())
        assert worst <= rtol * (1.0 + scale), (what, worst)
