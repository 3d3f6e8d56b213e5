"""Every kind of module trains as it is: the fit runs, and its step is that of a loop over single samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

from lightning_dp import DPStrategy
from tests.helpers import Hidden, Recorder, make_trainer
from tests.strategies.model_cases import CASES, Case
from tests.strategies.tasks import NUM_CLASSES, NUM_FEATURES, NUM_SAMPLES, WIDTH


@pytest.fixture(autouse=True)
def _own_weights(_same_draws: None) -> Iterator[None]:
    """Weights for which every gradient of the table has a norm on either side of the bound."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(2)
        yield


@pytest.fixture
def own_draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Random draws become a function of the row they are made for: a sample has the same alone and in any batch.

    Covers ``torch.randn_like`` and dropout; dropout inside fused attention is off. Returns the names of what was drawn.
    """
    drawn: list[str] = []
    attention = F.scaled_dot_product_attention

    def draw(like: Tensor, name: str) -> Tensor:
        drawn.append(name)
        return torch.sin(1e3 * like.detach())

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not (training and p):
            return x
        scale = (draw(x, "dropout") > -math.cos(math.pi * p)).to(x.dtype) / (1 - p)
        return x.mul_(scale) if inplace else x * scale

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        without = [*args[:4], *(0.0 for _ in args[4:5]), *args[5:]]
        return attention(*without, **{name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()})

    monkeypatch.setattr(torch, "randn_like", lambda like: draw(like, "normal"))
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    return drawn


def single_gradients(module: L.LightningModule, samples: list[Any]) -> dict[str, Tensor]:
    """Each sample's gradient, by plain autograd on a batch that holds nothing else: (n, *shape) a parameter."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for sample in samples:
        batch = default_collate([sample])
        batch = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
        module.zero_grad(set_to_none=True)
        output = module.training_step(batch, 0)
        (output["loss"] if isinstance(output, dict) else output).sum().backward()
        for name, p in named.items():
            found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    module.zero_grad(set_to_none=True)
    return {name: torch.stack(rows) for name, rows in found.items()}


def check_step(case: Case, tmp_path: Any, **settings: Any) -> None:
    """Every record is in the batch (q = 1), no noise, float64: p.grad is the clipped sum of single samples over n.

    The tolerance is above the 2e-7 by which clipping stays below C.
    """
    module, dataset = case.module().double(), case.dataset()
    gradients = single_gradients(module, [dataset[i] for i in range(NUM_SAMPLES)])
    norms = sum(rows.reshape(NUM_SAMPLES, -1).square().sum(1) for rows in gradients.values()).sqrt()
    max_grad_norm = float(norms.sort().values[3:5].mean())
    assert norms.min() < max_grad_norm < norms.max() / 1.02

    module.lr = 0.0
    recorder = Recorder()
    strategy = DPStrategy(noise_multiplier=0.0, max_grad_norm=max_grad_norm, **{**case.options, **settings})
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], precision="64-true")
    trainer.fit(module, DataLoader(dataset, batch_size=NUM_SAMPLES))

    (seen,) = recorder.before_step
    assert seen.keys() == gradients.keys()
    factors = (max_grad_norm / norms).clamp(max=1.0)
    for name, rows in gradients.items():
        expected = sum(factor * row for factor, row in zip(factors, rows, strict=True)) / NUM_SAMPLES
        torch.testing.assert_close(
            seen[name], expected, rtol=1e-6, atol=1e-6 * max_grad_norm, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(4)
def test_step_is_that_of_a_loop_over_single_samples(tmp_path: Any, own_draws: list[str], name: str) -> None:
    """Without the checks of the first batch, which run where the module trains as it is."""
    check_step(CASES[name], tmp_path, check_per_sample=False)
    assert bool(own_draws) == ("dropout" in name or "variational" in name)


@pytest.mark.parametrize(
    "settings", [{"grad_sample": "materialize"}, {"microbatch_size": 1}, {"microbatch_size": 3}], ids=str
)
@pytest.mark.parametrize(
    "name",
    [
        "in-place activation after the first layer",
        "convolution {'groups': 2, 'stride': 2}",
        "embedded positions (1, T)",
        "vision transformer",
        "tied language model",
        "recurrent cell",
        "LSTM {'batch_first': True}",
        "views, view-major",
        "sum of losses",
    ],
)
@pytest.mark.one_in(6)
def test_other_ways_to_the_gradients_agree(tmp_path: Any, name: str, settings: dict[str, Any]) -> None:
    check_step(CASES[name], tmp_path, check_per_sample=False, **settings)


#: Modules that are trained by default, for one step; the slow tests train all.
TRAINED = (
    "a call for each record",
    "embedding bag",
    "packed sequences",
    "weight_norm, parametrization",
    "experts",
    "checkpointing, reentrant",
    "nested batch",
)


@pytest.mark.parametrize(
    ("name", "steps"),
    [*((name, 1) for name in TRAINED), *(pytest.param(name, 3, marks=pytest.mark.slow) for name in CASES)],
)
def test_module_trains_as_it_is(tmp_path: Any, name: str, steps: int) -> None:
    """Each step is in the ledger, moves what is trainable and nothing else, and leaves no trace in the module.

    The second step repeats the checks of samples, which takes as long as the rest.
    """
    module, recorder = CASES[name].module(), Recorder()
    before, attributes = copy.deepcopy(module.state_dict()), traces(module)
    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=5, **CASES[name].options)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=2, max_steps=steps)
    trainer.fit(module, DataLoader(CASES[name].dataset(), batch_size=NUM_SAMPLES // 2))
    assert trainer.global_step == strategy.ledger.num_steps == len(recorder.before_step) == steps
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert traces(module) == attributes
    for key, p in module.named_parameters():
        assert torch.isfinite(p).all()
        assert bool((p.detach() != before[key]).any()) == p.requires_grad


def traces(module: nn.Module) -> list[tuple[str, type, list[str], int]]:
    """What is hung onto each submodule: its class, its attributes, and how many hooks it has."""
    return [
        (
            name,
            type(part),
            sorted(part._parameters),
            sum(len(hooks) for key, hooks in vars(part).items() if key.endswith("_hooks")),
        )
        for name, part in module.named_modules()
    ]


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(NUM_FEATURES, WIDTH)), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Hidden.apply(x, self.weight).tanh())
