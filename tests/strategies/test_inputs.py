"""Module and training data as users give them: layers exchanged in time, loaders of every shape that can be private."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_dp import DPStrategy, FixModule, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_loader, make_trainer


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, NUM_CLASSES))


class BornInFit(Classifier):
    """Makes its layers in a hook of the fit, as packages do that see the data first."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.network, self.hook = nn.Linear(1, 1), hook

    def make(self, hook: str) -> None:
        if hook == self.hook:
            self.network = network()

    def setup(self, stage: str) -> None:
        self.make("setup")

    def configure_model(self) -> None:
        self.make("configure_model")


# ---------------------------------------------------------------- layers that cannot be private


@pytest.mark.parametrize("hook", ["__init__", "setup", "configure_model"])
def test_fix_reaches_layers_wherever_they_are_made(hook: str, tmp_path: Any) -> None:
    module = Classifier(network()) if hook == "__init__" else BornInFit(hook)
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path)
    trainer.fit(module, make_loader())
    assert type(module.network[1]) is nn.GroupNorm
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}


def test_fix_module_exchanges_layers_before_optimizers_are_made(tmp_path: Any) -> None:
    module, callback = Classifier(network()), FixModule()
    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path, callbacks=[callback])
    trainer.fit(module, make_loader())
    assert type(module.network[1]) is nn.GroupNorm
    assert callback.changes[0].startswith("network.1: BatchNorm1d became GroupNorm")
    assert any(p is module.network[1].weight for p in trainer.optimizers[0].param_groups[0]["params"])


def test_a_fixed_run_resumes_and_is_tested_from_its_checkpoint(tmp_path: Any) -> None:
    first = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path)
    first.fit(Classifier(network()), make_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = make_trainer(DPStrategy(noise_multiplier=1.0, fix=True), tmp_path, max_epochs=2)
    again = Classifier(network())
    second.fit(again, make_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert second.strategy.ledger.num_steps == 2 * first.strategy.ledger.num_steps
    tested = Classifier(network())
    second.test(tested, make_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert type(tested.network[1]) is nn.GroupNorm
    torch.testing.assert_close(tested.network[1].weight, first.lightning_module.network[1].weight)


def test_fix_is_offered_only_where_it_changes_something(tmp_path: Any) -> None:
    class Counted(Classifier):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__(nn.Sequential(nn.Linear(NUM_FEATURES, 16), *layers, nn.Linear(16, NUM_CLASSES)))
            self.words = nn.Embedding(4, 2, max_norm=1.0)

    trainer = make_trainer(DPStrategy(noise_multiplier=1.0), tmp_path)
    with pytest.raises(PrivacyError, match="leave max_norm out") as error:
        trainer.fit(Counted(), make_loader())
    assert "fix" not in str(error.value)
    with pytest.raises(PrivacyError, match=r"`DPStrategy\(fix=True\)`, replaces 1 of these 2"):
        trainer.fit(Counted(nn.BatchNorm1d(16)), make_loader())


def test_fix_is_a_flag() -> None:
    with pytest.raises(TypeError, match="fix to be True or False, got fix=1"):
        DPStrategy(noise_multiplier=1.0, fix=1)  # type: ignore[arg-type]
