"""Models of transformers and peft train as they are: each step is that of a loop over single samples."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dp import DPStrategy, PrivacyError
from tests.helpers import Recorder, make_trainer
from tests.models.cases import CASES, REFUSED
from tests.models.modules import DCGAN, NUM_RECORDS, FineTuning, fixed, images, text
from tests.models.networks import minilm
from tests.strategies.test_models import check_step, traces

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


#: Low-rank adapters are in other cases too; here it is all 22.7 million weights that take the time.
NAMES = [pytest.param(name, marks=pytest.mark.slow if name == "MiniLM, LoRA" else ()) for name in CASES]

#: Networks that are trained by default.
TRAINED = (
    "BERT, LoRA",
    "Llama",
    "ResNet, fixed",
    "Mamba",
    "two towers, tied tables",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.one_in(4)
def test_step_is_that_of_a_loop_over_single_samples(tmp_path: Any, own_draws: list[str], name: str) -> None:
    check_step(CASES[name], tmp_path, check_per_sample=False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TRAINED else pytest.mark.slow) for name in CASES]
)
@pytest.mark.one_in(3)
def test_model_trains_as_it_is(tmp_path: Any, name: str) -> None:
    check_fit(CASES[name].module(), CASES[name].dataset(), tmp_path)


@pytest.mark.slow
def test_a_whole_encoder_trains_as_it_is(tmp_path: Any) -> None:
    """All 22.7 million weights of MiniLM, from the published ones."""
    check_fit(FineTuning(minilm()), text(), tmp_path, steps=1)


def check_fit(module: L.LightningModule, dataset: Any, tmp_path: Any, *, steps: int = 2) -> None:
    """The independence check passes; trainable parameters move, no other does; the module is left without a trace."""
    recorder = Recorder()
    before, attributes = copy.deepcopy(module.state_dict()), traces(module)
    strategy = DPStrategy(noise_multiplier=1.0, microbatch_size=3)
    trainer = make_trainer(strategy, tmp_path, callbacks=[recorder], max_epochs=1)
    trainer.fit(module, DataLoader(dataset, batch_size=NUM_RECORDS // steps))
    assert trainer.global_step == strategy.ledger.num_steps == len(recorder.before_step) == steps
    assert traces(module) == attributes
    assert module.state_dict().keys() == before.keys()
    for key, p in module.named_parameters():
        assert torch.isfinite(p).all()
        assert bool((p.detach() != before[key]).any()) == p.requires_grad


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.one_in(2)
def test_what_cannot_work_is_refused_with_the_way_out(tmp_path: Any, name: str) -> None:
    case, message = REFUSED[name]
    strategy = DPStrategy(noise_multiplier=1.0, **case.options)
    with pytest.raises(PrivacyError, match=message):
        make_trainer(strategy, tmp_path).fit(case.module(), DataLoader(case.dataset(), batch_size=NUM_RECORDS))
    assert strategy.ledger.num_steps == 0


@pytest.mark.slow
def test_a_convolutional_gan_stepped_by_hand(tmp_path: Any) -> None:
    """The discriminator is private; the generator learns from it alone and is post-processing."""
    module = fixed(DCGAN())
    before = copy.deepcopy(module.state_dict())
    strategy = DPStrategy(noise_multiplier=1.0, public_optimizers=[0])
    trainer = make_trainer(strategy, tmp_path, max_epochs=2)
    trainer.fit(module, DataLoader(images(8), batch_size=NUM_RECORDS // 2))
    assert strategy.ledger.num_steps == strategy.steps_taken == 4
    for name, value in module.state_dict().items():
        assert bool((value != before[name]).any()), name


def test_a_gan_with_batch_norm_is_refused(tmp_path: Any) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, public_optimizers=[0])
    with pytest.raises(PrivacyError, match=r"BatchNorm2d.*lightning_dp\.fix"):
        make_trainer(strategy, tmp_path).fit(DCGAN(), DataLoader(images(8), batch_size=NUM_RECORDS))
    assert strategy.ledger.num_steps == 0
