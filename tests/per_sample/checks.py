"""One comparison for all: everything the engine returns against a loop over batches of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.masks import ParameterMask
from lightning_dp.per_sample import PerSampleEngine
from lightning_dp.per_sample.rules import Call, Rule
from lightning_dp.per_sample.rules.base import accumulation_dtype
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
    twice: bool = False,
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
    assert not twice or engine.differentiate_twice()
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
            if what == "grads":
                grads = engine.per_sample_gradients(names)
                for name in names:
                    assert_close(grads[name], expected[name], scale, rtol, name)
                continue
            for mask in (None, masks):
                chosen = None if mask is None else parameter_masks(mask)
                if what == "norms":
                    true = reference.squared_norms(expected, groups, mask)
                    largest = float(true.max()) if true.numel() else 1.0
                    assert_close(engine.squared_norms(groups, chosen), true, largest, rtol, "norms")
                    continue
                dtype = next(iter(expected.values())).dtype
                totals = {n: torch.tensordot(factors[i].to(dtype), expected[n], dims=1) for i, n in enumerate(names)}
                scratch = {n: torch.full_like(total, torch.nan) for n, total in totals.items()} if repeat else None
                if mask is not None:
                    totals = {n: total[mask[n]] for n, total in totals.items()}
                out = {n: torch.ones_like(total) for n, total in totals.items()}
                engine.accumulate(factors.to(dtype), singles, out, chosen, scratch)
                for name in names:
                    assert_close(out[name] - 1, totals[name], scale, rtol, name)
        engine.end()
    return engine


def parameter_masks(booleans: dict[str, Tensor]) -> dict[str, ParameterMask]:
    """Masks by parameter name."""
    return {name: ParameterMask(active) for name, active in booleans.items()}


def rows_for(masks: dict[str, ParameterMask], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Accumulation targets under masks, filled with zeros."""
    return {name: torch.zeros(mask.num_active, dtype=dtype) for name, mask in masks.items()}


def weighted_sum(
    rule: Rule, module: nn.Module, calls: list[Call], factors: Tensor, batch_size: int, names: set[str]
) -> dict[str, Tensor]:
    """What a rule adds to zeros."""
    dtype = accumulation_dtype(calls[0].backprop)
    out = {name: torch.zeros_like(module.get_parameter(name), dtype=dtype) for name in sorted(names)}
    rule.add_weighted_sum(module, calls, factors, batch_size, out)
    return out


def assert_close(got: Tensor, expected: Tensor, scale: float, rtol: float, what: str) -> None:
    assert got.shape == expected.shape, (what, got.shape, expected.shape)
    assert got.dtype == expected.dtype, (what, got.dtype)
    if got.numel():
        worst = float((got - expected).abs().max())
        assert worst <= rtol * (1.0 + scale), (what, worst)
