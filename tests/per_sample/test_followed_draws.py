"""Random draws whose parameters are rows, and losses of rows, where the owners of rows are followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from lightning_dp.errors import PrivacyError
from tests.per_sample.owners import make
from tests.per_sample.test_owned_steps import BATCHES, _assert_step_agrees, batch_of

Step = Callable[[Tensor, nn.Module], Tensor]


class Net(nn.Module):
    """Sums of a layer over the nodes of each record, whose inputs a step makes of the nodes."""

    def __init__(self, how: Step) -> None:
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def sample_of_row(self, batch: Any) -> dict[str, Tensor]:
        return {"x": batch["of_node"], "edge": batch["of_edge"], "to": batch["of_edge"]}

    def forward(self, batch: Any) -> Tensor:
        made = self.first(self.how(batch["x"], self.first) * batch["x"])
        total = torch.zeros_like(batch["y"]).index_add(0, batch["of_node"], made)
        return (self.head(total + batch["y"]) - batch["y"]).square().sum(1)


def likelihood(kind: Any, *, kept: bool = False) -> Step:
    """Return a step that draws from a distribution and computes a likelihood."""

    def step(x: Tensor, layer: nn.Module) -> Tensor:
        drawn = kind(layer(x)) if kept else kind(x)
        return drawn.log_prob(drawn.sample() * 0 + 0.5) if len(x) else x

    return step


def classes(x: Tensor) -> Tensor:
    return x.argmax(1)


FOLLOWED: dict[str, Step] = {
    "normal": lambda x, _: torch.normal(x, torch.zeros_like(x)),
    "normal of numbers": lambda x, _: torch.normal(0.0, 1.0, x.shape) * 0 + x,
    "normal of a layer": lambda x, layer: torch.normal(layer(x), 0.0),
    "poisson": lambda x, _: torch.poisson(x.abs() * 0) + x,
    "binomial": lambda x, _: torch.binomial((x > 0).float(), torch.ones_like(x)),
    "gamma": lambda x, _: torch._standard_gamma(x.exp()) * 0 + x,
    "exponential": lambda x, _: torch.empty_like(x).exponential_() * 0 + x,
    "gumbel": lambda x, _: F.gumbel_softmax(1e6 * x, hard=True) if len(x) else x,
    "multinomial": lambda x, _: torch.eye(4)[torch.multinomial((1e3 * x).softmax(1), 1)[:, 0]] if len(x) else x,
    "Normal": likelihood(lambda x: distributions.Normal(x, x.exp())),
    "Normal of a layer": likelihood(lambda x: distributions.Normal(x, 1.0 + x.exp()), kept=True),
    "Gamma": likelihood(lambda x: distributions.Gamma(x.exp(), x.exp())),
    "Bernoulli": likelihood(lambda x: distributions.ContinuousBernoulli(logits=x)),
    "kl_divergence": lambda x, layer: distributions.kl_divergence(
        distributions.Normal(layer(x), x.exp()), distributions.Normal(torch.zeros(()), torch.ones(()))
    ),
    "mse_loss": lambda x, _: F.mse_loss(x, 2 * x, reduction="none"),
    "binary loss": lambda x, _: F.binary_cross_entropy_with_logits(x, x.sigmoid(), reduction="none"),
    "cross_entropy": lambda x, _: F.cross_entropy(x, classes(x), reduction="none")[:, None],
    "nll_loss": lambda x, _: F.nll_loss(x.log_softmax(1), classes(x), reduction="none")[:, None],
    "cosine loss": lambda x, _: F.cosine_embedding_loss(x, 2 * x, x[:, 0].sign(), reduction="none")[:, None],
}

MIXING: dict[str, Step] = {
    "normal of another row": lambda x, _: torch.normal(x, 0.0).roll(1, 0),
    "mean of normal": lambda x, _: torch.normal(x, 0.0).mean(0),
    "mse_loss": lambda x, _: F.mse_loss(x, 2 * x),
    "mse_loss of a column": lambda x, _: F.mse_loss(x[:, 0], 2 * x[:, 0]),
    "mse_loss to the first row": lambda x, _: F.mse_loss(x, x[:1].expand(len(x), 4), reduction="none"),
    "cross_entropy": lambda x, _: F.cross_entropy(x, classes(x)),
    "cross_entropy over rows": lambda x, _: F.cross_entropy(x.t(), x.argmax(0) % len(x), reduction="none"),
    "losses in columns": lambda x, _: F.nll_loss(x.t()[None], classes(x)[None] % 3, reduction="none").t(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("how", FOLLOWED)
@pytest.mark.one_in(4)
def test_draws_and_losses_of_rows_keep_their_owners(how: str) -> None:
    torch.manual_seed(0)
    module = Net(FOLLOWED[how])
    engine = make(module, module, lambda chosen: batch_of(chosen, 0))
    assert engine.follows_owners
    for step, records in enumerate(BATCHES):
        _assert_step_agrees(engine, module, [int(one) for one in records.strip("-")], step)


@pytest.mark.parametrize("how", MIXING)
@pytest.mark.one_in(4)
def test_draws_and_losses_over_rows_are_refused(how: str) -> None:
    torch.manual_seed(0)
    module = Net(MIXING[how])
    with pytest.raises(PrivacyError, match="Expected"):
        make(module, module, lambda chosen: batch_of(chosen, 0))
