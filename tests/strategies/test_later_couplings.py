"""A coupling of samples that begins after some steps, between two of the regular checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DPStrategy, PrivacyError, make_private
from tests.helpers import make_trainer, stepped_on

BEGINS = 4
PLANNED = 18
PASS = 10


class Network(nn.Module):
    """Subtracts the mean of the batch, if asked to, from features, or from the data.

    Args:
        of_data: from the data.
        depth: blocks between features and loss; 14 are more operations than are read next to the loss of every step.
    """

    def __init__(self, *, of_data: bool = False, depth: int = 14) -> None:
        super().__init__()
        self.of_data = of_data
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.middle = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))

    def forward(self, rows: Tensor, *, mixes: bool) -> Tensor:
        features = self.first(rows - rows.mean(0) if mixes and self.of_data else rows)
        features = features - features.mean(0) if mixes and not self.of_data else features
        for layer in self.middle:
            features = features + layer(features)
        out: Tensor = self.last(features)
        return out


class Module(L.LightningModule):
    def __init__(self, *, automatic: bool = True, begins: int = PLANNED, of_data: bool = False, depth: int = 1) -> None:
        super().__init__()
        self.network = Network(of_data=of_data, depth=depth)
        self.automatic_optimization, self.begins = automatic, begins

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return stepped_on(self, self.network(batch[0], mixes=self.global_step >= self.begins).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(100, 4)), batch_size=10)


def seeded(**more: Any) -> DPStrategy:
    """Seeded: a batch may hold fewer than two records, which cannot be exchanged."""
    return DPStrategy(noise_multiplier=1.0, max_grad_norm=1.0, target_delta=1e-3, seed=0, **more)


def trainer(strategy: DPStrategy, **more: Any) -> L.Trainer:
    return make_trainer(strategy, None, **{"max_epochs": -1, "max_steps": PLANNED, **more})


def steps_of_fit(*, automatic: bool, begins: int, of_data: bool = False, **more: Any) -> tuple[int, str]:
    """Number of released steps, and what stopped the run."""
    strategy = seeded()
    try:
        trainer(strategy, **more).fit(
            Module(automatic=automatic, begins=begins, of_data=of_data, depth=1 if of_data else 14), loader()
        )
    except PrivacyError as error:
        return strategy.steps_taken, str(error)
    return strategy.steps_taken, ""


def test_coupling_is_refused_before_its_first_step() -> None:
    steps, error = steps_of_fit(automatic=True, begins=BEGINS)
    assert steps == BEGINS
    assert "exchanged for another record" in error


@pytest.mark.slow
def test_coupling_under_manual_steps_is_refused_after_one() -> None:
    steps, error = steps_of_fit(automatic=False, begins=BEGINS)
    assert steps == BEGINS + 1
    assert "exchanged for another record" in error
    assert "in the step before this one, which was released" in error


@pytest.mark.slow
def test_coupling_in_the_last_manual_step_is_refused() -> None:
    steps, error = steps_of_fit(automatic=False, begins=BEGINS, max_steps=BEGINS + 1)
    assert steps == BEGINS + 1
    assert "which was released" in error


def test_statistics_of_data_from_a_pass_on_are_refused() -> None:
    """They leave no trace in the graph of the loss."""
    steps, error = steps_of_fit(automatic=True, begins=PASS, of_data=True)
    assert steps == PASS
    assert "exchanged for another record" in error
    steps, error = steps_of_fit(automatic=False, begins=PASS, of_data=True)
    assert steps == PASS + 1
    assert "which was released" in error


def train(network: Network, mixes: Callable[[int, int], bool], **more: Any) -> tuple[int, list[int]]:
    """Train in a loop until a coupling is refused; return the number of released steps, and the sizes of batches."""
    sizes: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        return model(batch[0], mixes=mixes(private.steps_taken, len(batch[0]))).square().mean()

    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    settings: Any = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-3, "seed": 0, **more}
    private = make_private(network, optimizer, loader(), loss_fn, steps=200, **settings)

    def fit() -> None:
        while private.steps_taken < 200:
            for batch in private.loader:
                sizes.append(batch.num_samples)
                private.step(batch)

    with private, pytest.raises(PrivacyError, match="exchanged for another record"):
        fit()
    return private.steps_taken, sizes


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.one_in(2)
def test_coupling_in_a_loop_is_refused_before_its_step(microbatch_size: int | None) -> None:
    assert train(Network(), lambda step, size: step >= BEGINS, microbatch_size=microbatch_size)[0] == BEGINS


@pytest.mark.parametrize("size", [8, 9, 12])
@pytest.mark.one_in(3)
def test_coupling_of_one_size_is_refused_before_its_step(size: int) -> None:
    """The real batch that shows the new form is exchanged, unless a regular check drew the size before."""
    steps, sizes = train(Network(of_data=True, depth=1), lambda step, rows: rows == size)
    assert size not in sizes[:steps]


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [True, False])
def test_modules_without_a_coupling_train(automatic: bool) -> None:
    assert steps_of_fit(automatic=automatic, begins=PLANNED) == (PLANNED, "")


class Writes(Module):
    """Lets the records of one batch change something else than its loss."""

    def __init__(self, what: str) -> None:
        super().__init__(automatic=what != "a rate set by hand")
        self.what = what
        self.register_buffer("mean", torch.zeros(4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == BEGINS or (self.global_step > BEGINS and not self.automatic_optimization):
            self.write(batch[0].mean(0))
        return super().training_step(batch, batch_idx)

    @torch.no_grad()
    def write(self, seen: Tensor) -> None:
        if self.what == "a parameter":
            self.network.first.weight.add_(seen)
        elif self.what == "another parameter":
            self.network.first.weight = nn.Parameter(self.network.first.weight + seen)
        elif self.what == "a state":
            state = {name: value + seen.sum() for name, value in self.network.state_dict().items()}
            self.network.load_state_dict(state)
        elif self.what == "a buffer":
            self.mean.copy_(seen)
        else:
            optimizer: Any = self.optimizers()
            optimizer.param_groups[0]["lr"] = 0.01 * float(seen.sum().exp())


@pytest.mark.parametrize(
    "what", ["a parameter", "another parameter", "a state", "a buffer", "a rate", "a rate set by hand"]
)
@pytest.mark.one_in(2)
def test_a_single_write_of_data_is_refused(what: str) -> None:
    """It is in the weights or in the next release, without noise; that of a manual step only if it goes on."""
    strategy = seeded()
    with pytest.raises(PrivacyError, match="with another value after another record"):
        trainer(strategy).fit(Writes(what), loader())
    assert strategy.steps_taken == BEGINS + (what == "a rate set by hand")


class Switches(L.Callback):
    """Lets a batch decide what trains, or in which mode."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        positive = bool(batch[0].mean() > 0)
        if self.what == "mode":
            pl_module.network.middle.train(positive)
        else:
            pl_module.network.last.requires_grad_(positive)


@pytest.mark.parametrize("what", ["mode", "what trains"])
def test_a_callback_that_switches_by_data_is_refused(what: str) -> None:
    strategy = seeded()
    module = Module()
    with pytest.raises(PrivacyError, match=r"with another value after|[Ss]amples influence each other"):
        trainer(strategy, callbacks=[Switches(what)]).fit(module, loader())
    assert strategy.steps_taken <= 10


def test_a_transfer_that_begins_to_mix_is_refused_in_time() -> None:
    class Centred(Module):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] - batch[0].mean(0)] if self.trainer.global_step >= 12 else batch

    strategy = seeded()
    with pytest.raises(PrivacyError, match="exchanged for another record"):
        trainer(strategy).fit(Centred(), loader())
    assert strategy.steps_taken == 16
