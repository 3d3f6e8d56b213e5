"""Compiled modules: they stay compiled where samples run one at a time, and run eagerly by rules."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import NUM_CLASSES, NUM_FEATURES, NUM_RECORDS, Classifier, make_loader, make_trainer

pytestmark = [  # torch's own warnings, when its compiler is imported and when it looks at an input
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Network(nn.Module):
    """Not a container of torch's own, which ``Module.compile`` leaves eager."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(NUM_FEATURES, NUM_CLASSES), torch.tanh

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.layer(features))


@pytest.mark.parametrize("how", ["wrapped", "in place", "whole", "function"])
@pytest.mark.parametrize("grad_sample", ["single", "rules"])
@pytest.mark.one_in(4)
def test_compiled_code_runs_for_single_samples_alone(tmp_path: Any, caplog: Any, grad_sample: Any, how: str) -> None:
    """Also after the fit, whose trials watch operations: torch would not compile again what it has run so."""
    torch.compiler.reset()
    torch.compiler.set_stance("default")  # another test may have left an engine in the middle of a batch
    caplog.set_level(logging.INFO)
    runs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *args: runs.append(1) or graph.forward(*args)

    network, module = Network(), Classifier()
    module.network = torch.compile(network, backend=backend) if how == "wrapped" else network
    if how == "in place":
        network.compile(backend=backend)
    if how == "function":
        network.activation = torch.compile(lambda x: x.tanh(), backend=backend)
    given: Any = torch.compile(module, backend=backend) if how == "whole" else module
    before = network.layer.weight.detach().clone()
    strategy = DPStrategy(noise_multiplier=0.0, sampling="shuffle", grad_sample=grad_sample, seed=0)
    make_trainer(strategy, tmp_path).fit(given, make_loader())
    assert not torch.equal(network.layer.weight, before)
    num = NUM_RECORDS if grad_sample == "single" else 0
    assert len(runs) == num
    assert caplog.text.count("Compiled modules and functions run eagerly") == (0 if num else 1)
    assert ("(network.activation)" in caplog.text) == (how == "function" and not num)
    given(torch.ones(2, NUM_FEATURES))
    assert len(runs) > num


@pytest.mark.parametrize("grad_sample", ["auto", "single"])
def test_scripted_layers_run_one_sample_at_a_time(tmp_path: Any, caplog: Any, grad_sample: Any) -> None:
    caplog.set_level(logging.INFO)
    module = Classifier()
    module.network = nn.Sequential(nn.Linear(NUM_FEATURES, 3), torch.jit.script(nn.Linear(3, NUM_CLASSES)))
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, grad_sample=grad_sample)
    make_trainer(strategy, tmp_path).fit(module, make_loader())
    assert strategy.settings.grad_sample == grad_sample
    assert "one sample runs at a time" in strategy.privacy_statement()
    assert ("Leave out torch.jit" in caplog.text) == (grad_sample == "auto")


def test_scripted_layers_are_refused_by_rules(tmp_path: Any) -> None:
    module = Classifier()
    module.network = nn.Sequential(nn.Linear(NUM_FEATURES, 3), torch.jit.script(nn.Linear(3, NUM_CLASSES)))
    with pytest.raises(PrivacyError, match=r"the scripted or traced .*Leave out torch\.jit"):
        make_trainer(DPStrategy(noise_multiplier=1.0, grad_sample="rules"), tmp_path).fit(module, make_loader())
