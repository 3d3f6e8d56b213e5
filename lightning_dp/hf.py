"""PrivateTrainerMixin: private training with the Trainer of Hugging Face transformers, which is imported on use."""

from __future__ import annotations

import copy
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_dp.errors import PrivacyError
from lightning_dp.loop.run import PrivateLoop
from lightning_dp.step.arguments import PrivateArguments, make_settings
from lightning_dp.step.history import apart

if TYPE_CHECKING:
    Base = Any
else:
    Base = object

#: File with the privacy state in a folder of a checkpoint.
STATE = "privacy.pt"

_MEMORY = "Use a larger per_device_train_batch_size; privacy={'microbatch_size': ...} bounds the memory."
#: Arguments of TrainingArguments -> values that can be private, and advice for other values.
_ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_grad_norm": (
        (0, 0.0, None),
        "It would clip the noisy gradient: privacy={'max_grad_norm': ...} bounds each sample.",
    ),
    "gradient_accumulation_steps": ((1,), _MEMORY),
    "auto_find_batch_size": ((False,), f"Its trials train on the data, and the sample rate must be known. {_MEMORY}"),
    "fp16": ((False,), "Its gradient scaler scales what is clipped: use bf16=True."),
    "deepspeed": ((None,), "Per-sample gradients need whole parameters: train on one device."),
    "fsdp": ((None, "", [], False), "Per-sample gradients need whole parameters: train on one device."),
    "n_gpu": ((0, 1), "Samples are split over devices there: make one device visible."),
    "world_size": ((1,), "Train in one process, or under Lightning with DPDDPStrategy."),
    "torch_compile": ((False,), "Hooks that record per-sample gradients do not reach into a compiled graph."),
    "include_num_input_tokens_seen": (("no", False), "How many tokens were drawn is private."),
    "group_by_length": ((False,), "Who meets in a batch must be drawn independently."),
    "train_sampling_strategy": (("random",), "Who meets in a batch must be drawn independently."),
    "neftune_noise_alpha": ((None,), "The longest record of a batch sets the scale of its noise for all others."),
    "use_liger_kernel": ((False,), "Its fused kernels hide per-sample gradients."),
}


#: Attributes of a Trainer that are not state of ``compute_loss``: they hold data, or lead to everything else.
_OUTSIDE = frozenset(
    ("accelerator", "args", "callback_handler", "compute_metrics", "data_collator", "eval_dataset", "gather_function",
     "model_init", "optimizer", "preprocess_logits_for_metrics", "processing_class", "settings", "state",
     "train_dataset", "_memory_tracker", "_private")
)  # fmt: skip


class PrivateTrainerMixin(Base):  # type: ignore[misc]
    """A mixin that makes a transformers ``Trainer`` private, with epsilon in its log and the ledger in checkpoints.

    **Guarantee**: as for ``PrivateLoop``. The log holds no training loss, unless ``log_loss`` is True. NOT private, but
    named by the statement: what ``compute_loss`` logs. NOT covered: evaluations, and checkpoints chosen by them.

    Args:
        *args: arguments of the Trainer.
        privacy: arguments of ``DPStrategy``, without ``public_optimizers`` and ``strict_logging``.
        log_loss: log the loss on training data as "nonprivate/loss". NOT private: the statement names it.
        **kwargs: arguments of the Trainer.

    Raises:
        ValueError: a ``TrainingArguments`` with a value that cannot be private.

    Example::

        class PrivateTrainer(PrivateTrainerMixin, transformers.Trainer):
            pass

        args = TrainingArguments(output_dir="out", max_grad_norm=0, num_train_epochs=3)
        trainer = PrivateTrainer(model, args, train_dataset=data, privacy={"target_epsilon": 3.0})
        trainer.train()
        print(trainer.private.privacy_statement())
    """

    _lightning_dp_outside = _OUTSIDE

    def __init__(self, *args: Any, privacy: PrivateArguments, log_loss: bool = False, **kwargs: Any) -> None:
        self.settings = make_settings(privacy, owner="privacy")
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        self.log_loss = log_loss
        self._private: PrivateLoop | None = None
        self._checkpoint: str | None = None
        self._in_loss = False

    @property
    def private(self) -> PrivateLoop:
        """The private run, with ledger, epsilon and statement.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._private is None:
            raise RuntimeError(
                "The private run is made when training begins, so there is none yet. Call train() first."
            )
        return self._private

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train privately, with the arguments of the Trainer's own ``train``.

        Args:
            resume_from_checkpoint: folder of a private checkpoint, or True for the newest one.
            *args: further arguments of the Trainer's ``train``.
            **kwargs: further arguments of the Trainer's ``train``.
        """
        if resume_from_checkpoint is True:
            from transformers.trainer_utils import get_last_checkpoint

            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"Expected a checkpoint in output_dir={self.args.output_dir!r}, got none. Train without "
                    "resume_from_checkpoint."
                )
        if resume_from_checkpoint and not self.args.ignore_data_skip:
            raise ValueError(
                "Expected TrainingArguments(ignore_data_skip=True) to resume, got ignore_data_skip=False. Batches are "
                "drawn again, so there are none to skip."
            )
        self._checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._private is not None:
                self._private.close()

    def get_train_dataloader(self) -> Any:
        """Make the private run, and return its loader of logical batches."""
        epochs, steps = self.args.num_train_epochs, self.args.max_steps
        if steps <= 0 and epochs != int(epochs):
            raise ValueError(
                f"Expected whole epochs, got num_train_epochs={epochs}. The noise is planned over whole passes: pass a "
                "whole number, or max_steps."
            )
        if self._private is not None and not self._private.ledger.num_steps:
            self._private.close()  # user code asked for a loader before
        self.create_optimizer()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )
        earlier = self._private
        self._private = PrivateLoop(
            self.model,
            cast(Optimizer, getattr(self.optimizer, "optimizer", self.optimizer)),
            loader,
            self._loss,
            settings=self.settings,
            length=(None, steps) if steps > 0 else (int(epochs), None),
            move=self._prepare_inputs,
            others=lambda: [one for one in (self.control, self.lr_scheduler) if one is not None],
        )
        if earlier is not None and self._checkpoint is None:
            self._private.state.ledger = apart(earlier.ledger)
        if self._checkpoint is not None:
            self._private.load_state_dict(_read(Path(self._checkpoint) / STATE))
        return self._private.loader

    def _loss(self, model: Any, batch: Any) -> Any:
        """Return the mean loss of a batch."""
        batch = copy.copy(batch) if isinstance(batch, MutableMapping) else batch  # labels are taken out of it
        self._in_loss = True
        try:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, batch)
        finally:
            self._in_loss = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Set the parameters' private gradients; return the loss under ``log_loss``, else 0."""
        for trained in (model, self.optimizer):  # optimizers without a schedule keep other weights for evaluation
            if callable(getattr(trained, "train", None)):
                trained.train()
        self.private.backward(inputs)
        return torch.tensor(self.private.nonprivate_loss if self.log_loss else 0.0, device=self.args.device)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], None]:
        """Return the next logical batch in a list, and None for its number of items, which is private."""
        batch = next(epoch_iterator, None)
        return ([] if batch is None else [batch]), None

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, because the number of operations would reveal the number of tokens drawn."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the values and epsilon, without losses on training data unless ``log_loss`` is True.

        The privacy statement names what ``compute_loss`` logs, and what a subclass adds to the values.
        """
        if self._private is not None and self._private.is_on_trial:
            return
        shown = {name: value for name, value in logs.items() if name not in ("loss", "train_loss")}
        if self.log_loss:
            shown |= {f"nonprivate/{name}": logs[name] for name in ("loss", "train_loss") if name in logs}
        if self._private is not None and self._private.ledger.num_steps:
            shown["epsilon"] = self._private.epsilon()
        public = {"epoch", "step", "epsilon"} | (set() if self._in_loss else set(shown))
        super().log(shown, *args, **kwargs)
        if self._private is not None and self.state.log_history:
            found = self.state.log_history[-1].keys() - public
            self._private.state.nonprivate_logs.update(name for name in found if not name.startswith("eval_"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the ledger before the weights, so that no folder holds weights without their ledger."""
        if self._private is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{STATE}.partial"
            torch.save(self._private.state_dict(), partial)
            os.replace(partial, folder / STATE)
        super().save_model(output_dir, _internal_call)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the search, because the epsilon of its trials would not be counted."""
        raise ValueError(
            "Expected no hyperparameter_search under a private Trainer, got a call. Each trial spends privacy that no "
            "ledger would hold: search on public data, or train each trial with history=..."
        )


def check_arguments(args: Any) -> None:
    """Check that no value in a ``TrainingArguments`` voids the guarantee.

    Raises:
        ValueError: such a value; the message names the argument.
    """
    for name, (allowed, advice) in _ALLOWED.items():
        value = getattr(args, name, allowed[0])
        if getattr(value, "value", value) not in allowed:
            raise ValueError(
                f"Expected TrainingArguments({name}={allowed[0]!r}) for private training, got {name}={value!r}. "
                f"{advice}"
            )
    if "lomo" in str(getattr(args.optim, "value", args.optim)):
        raise ValueError(
            f"Expected an optimizer that steps after the backward, got optim={args.optim!r}. It updates weights on raw "
            "gradients: use 'adamw_torch' or 'sgd'."
        )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise PrivacyError(
            f"Expected a checkpoint of a private run, got {str(path.parent)!r} without {STATE}. What its weights have "
            "spent is unknown: resume from a checkpoint of a private run."
        )
    return torch.load(path, weights_only=True)
