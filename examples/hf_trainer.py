"""The Trainer of Hugging Face's transformers, made private by a mixin: a tiny BERT, epsilon in the log, and a resumed
run.

    python examples/hf_trainer.py            # half a minute on two cores
    python examples/hf_trainer.py --smoke    # two epochs

The weights are random and the sentences synthetic: nothing is downloaded. The first half of the run is stopped and
resumed from its checkpoint; the ledger goes on.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from lightning_dp.hf import PrivateTrainerMixin

OUT = Path(__file__).parent / "out" / "hf_trainer"
WORDS, LENGTH = 40, 12


class Sentences(Dataset):
    """Sentences whose label is whether words of the first half of the vocabulary are more frequent."""

    def __init__(self, num: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(2, (num,), generator=generator)
        low, high = (
            torch.randint(a, b, (num, LENGTH), generator=generator) for a, b in ((1, WORDS // 2), (WORDS // 2, WORDS))
        )
        mostly = torch.rand(num, LENGTH, generator=generator) < 0.8
        self.words = torch.where(mostly == self.labels.bool()[:, None], low, high)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    """A private Trainer: nothing but the mixin."""


class Stop(TrainerCallback):
    """Ends the first run half-way."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control


def make_trainer(epochs: int, callbacks: list[TrainerCallback]) -> PrivateTrainer:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=2, **size)
    )
    args = TrainingArguments(
        output_dir=str(OUT),
        num_train_epochs=epochs,
        per_device_train_batch_size=256,
        learning_rate=5e-3,
        max_grad_norm=0,
        save_steps=4,
        logging_steps=4,
        ignore_data_skip=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    return PrivateTrainer(
        model,
        args,
        train_dataset=Sentences(2048, seed=1),
        eval_dataset=Sentences(256, seed=2),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        callbacks=callbacks,
        privacy={"target_epsilon": 8.0, "target_delta": 1e-4},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    options = parser.parse_args()
    epochs = 2 if options.smoke else options.epochs
    shutil.rmtree(OUT, ignore_errors=True)
    half = make_trainer(epochs, [Stop(4 * epochs)])
    half.train()
    trainer = make_trainer(epochs, [])
    trainer.train(resume_from_checkpoint=True)
    print(trainer.private.privacy_statement())
    accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"test accuracy: {accuracy:.3f}")
    assert trainer.private.ledger.num_steps == trainer.state.global_step == 8 * epochs
    assert half.private.epsilon() < trainer.private.epsilon() <= 8.0
    assert any("epsilon" in row for row in trainer.state.log_history)
    assert options.smoke or accuracy > 0.7, f"Expected an accuracy above 0.7, got {accuracy:.3f}."


if __name__ == "__main__":
    main()
