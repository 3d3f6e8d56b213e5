"""Models whose own loss shares a denominator train by per_sample_loss=True, in one batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as hf

from tests.models.modules import NUM_CLASSES, FineTuning, Record, continuations, text
from tests.models.networks import SMALL, WORDS, gpt2, llama
from tests.strategies.model_cases import Case
from tests.strategies.test_models import check_step

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tagged() -> list[Record]:
    """Sentences with a label for each token; what is filled up has label -100."""
    labels = (torch.arange(6) * 7 + torch.arange(8)[:, None]) % NUM_CLASSES
    return [
        {**record, "labels": labels[i].masked_fill(record["attention_mask"] == 0, -100)}
        for i, record in enumerate(text())
    ]


def tagger() -> Any:
    return hf.BertForTokenClassification(hf.BertConfig(**SMALL, **WORDS))


CASES = {
    "BERT token classification": Case(lambda: FineTuning(tagger()), tagged, {"per_sample_loss": True}),
    "Llama": Case(lambda: FineTuning(llama()), continuations, {"per_sample_loss": True}),
    "GPT-2": Case(lambda: FineTuning(gpt2()), continuations, {"per_sample_loss": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("grad_sample", ["auto", "single"])
@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_a_loop_over_single_samples(
    tmp_path: Any, own_draws: list[str], caplog: pytest.LogCaptureFixture, name: str, grad_sample: str
) -> None:
    caplog.set_level(logging.INFO)
    check_step(CASES[name], tmp_path, grad_sample=grad_sample)
    assert not [r for r in caplog.records if "Each record runs alone" in r.message]
