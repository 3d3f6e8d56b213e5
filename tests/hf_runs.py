"""A tiny BERT with random weights, its sentences, and a start of its private Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_dp.hf import PrivateTrainerMixin

BATCH, LENGTH, WORDS = 8, 5, 11


class Sentences(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(WORDS, (LENGTH,), generator=generator), "labels": torch.tensor(index % 2)}


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    pass


class Gradients(TrainerCallback):
    """Keeps the weights, the batch and the gradient of every step."""

    def __init__(self, stop: int = -1) -> None:
        self.stop = stop
        self.seen: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop
        return control


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_grad_norm": 0,
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "ignore_data_skip": True,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def start(
    folder: Path,
    privacy: Any,
    *,
    kind: type[PrivateTrainer] = PrivateTrainer,
    stop: int = -1,
    log_loss: bool = False,
    collator: Any = None,
    **options: Any,
) -> PrivateTrainer:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(  # type: ignore[call-arg]
        vocab_size=WORDS, max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **size,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return kind(
        model,
        arguments(folder, **options),
        data_collator=collator,
        train_dataset=Sentences(),
        callbacks=[Gradients(stop)],
        privacy=privacy,
        log_loss=log_loss,
    )
