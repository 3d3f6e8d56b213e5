"""Checks of a private step; each check raises an error if continuing would void the guarantee."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.tracking.nodes import is_tracked
from lightning_dp.sampling import PrivateDataLoader
from lightning_dp.sandbox.sandbox import USE_OPTIMIZERS

STOP_ITERATION = (
    "training_step raised StopIteration; Lightning would take this for the end of the data. Catch it inside "
    "training_step."
)


def scalar_loss(output: Any, count: int, reduction: str, source: str = "training_step") -> Tensor | None:
    """Return the loss of the user's step as a scalar; None if the step returned None.

    Args:
        output: output of the user's step.
        count: number B of samples in the microbatch.
        reduction: "mean" or "sum", for a loss of shape (B,), or (k B,) if the step ran on k copies.
        source: name of the user's step, for messages.

    Raises:
        TypeError: an output that is not a loss.
        ValueError: a loss of a shape other than (), (B,) or (k B,).
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None and not isinstance(output, Mapping):
        return None
    if not isinstance(loss, Tensor):
        got = type(loss).__name__ if loss is not None else f"a dictionary with {sorted(map(str, output))} only"
        raise TypeError(
            f"Expected {source} to return a loss tensor, a dictionary with 'loss', or None, got {got}. Return the loss "
            "of shape () or (B,)."
        )
    if loss.numel() == 1:  # also of shape (1,), by a parameter of that shape
        return loss.reshape(()) if loss.dim() else loss
    if loss.dim() == 1 and loss.shape[0] % count == 0:
        return reduced(loss, reduction)
    raise ValueError(
        f"Expected a loss of shape () or (B,) with B={count} samples, got shape {tuple(loss.shape)}. Reduce it over "
        "everything but the samples."
    )


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean or the sum of per-sample losses, as ``loss_reduction`` says."""
    return losses.mean() if reduction == "mean" else losses.sum()


def sample_axes(two: Any, three: Any) -> tuple[str, ...]:
    """Return the paths of the tensors in a collated batch that have one row per record."""
    rows, others = _rows(two), _rows(three)
    return tuple(path for path in rows if (rows[path], others.get(path)) == (2, 3))


def check_rows(batch: Any, count: int, axes: tuple[str, ...]) -> None:
    """Check that a collated batch holds as many records as were drawn, or raise PrivacyError."""
    rows = _rows(batch) if axes else {}
    wrong = [f"{rows.get(path)} rows" for path in axes if rows.get(path) != count]
    if batch is None:  # Lightning would pass over it
        wrong = ["None"]
    if wrong:
        raise PrivacyError(
            f"Expected a batch of {count} records as drawn, got {wrong[0]}. The collate function drops or adds "
            "records, and gradients would be attributed to the wrong ones: filter the dataset before fit instead."
        )


def _rows(batch: Any, path: str = "") -> dict[str, int]:
    """Return the length of the first axis of every tensor, by its path within the batch."""
    kind = type(batch)
    if kind is Tensor:
        return {path: batch.shape[0]} if batch.dim() else {}
    if kind is list or kind is tuple or kind is dict:  # read for every batch: torch's paths take ten times as long
        pairs = batch.items() if kind is dict else enumerate(batch)
        found = [_rows(value, f"{path}[{key!r}]") for key, value in pairs]
        return {own: num for rows in found for own, num in rows.items()}
    leaves, _ = tree_flatten_with_path(batch)
    return {path + keystr(own): leaf.shape[0] for own, leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}


@contextmanager
def reached(loss: Tensor) -> Iterator[None]:
    """Check that the code within the context back-propagates a loss, or raise PrivacyError."""
    if not loss.requires_grad or is_tracked(loss):  # one of parameters alone is refused for what it is
        yield
        return
    seen: list[bool] = []
    handle = loss.register_hook(lambda gradient: seen.append(True))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
    if not seen:
        raise PrivacyError(
            "Expected the module's backward to back-propagate the loss, got none that did. The weights would move on "
            "noise alone: call loss.backward() in the override of backward, or leave the override out."
        )


def check_accumulation(parts: int, planned: int) -> None:
    """Check that a logical batch still consists of the planned number of batches, or raise PrivacyError."""
    if parts != planned:
        raise PrivacyError(
            f"Expected accumulate_grad_batches={planned} as when the data was set up, got {parts}. Parts of several "
            "logical batches would be summed, and one sample may be in each of them: set it before fit."
        )


def check_counts_once(optimizer: int, *, unfinished: bool, again: bool, microbatch_size: int | None) -> None:
    """Check, under manual optimization, that a sample enters an optimizer's sum at most once per step.

    Raises:
        PrivacyError: a sample could count twice.
    """
    if unfinished:
        raise PrivacyError(
            "Expected each batch's gradients to be stepped or zeroed within its own training_step, got gradients of "
            f"an earlier batch in optimizer {optimizer}. A sample could count twice in one step: use a larger "
            "batch_size (microbatch_size bounds the memory), or call zero_grad before manual_backward."
        )
    if again:
        raise PrivacyError(
            f"Expected one step of optimizer {optimizer} per batch under microbatch_size={microbatch_size}, got a "
            "second one on the same microbatch. Each sample would enter the sum twice: step once, or leave "
            "microbatch_size out."
        )


def check_no_raw_gradients(
    optimizer: int, stepping: Optimizer, known: Mapping[str, nn.Parameter], module: nn.Module
) -> None:
    """Check that only private parameters hold a gradient when an optimizer is about to step, or raise PrivacyError."""
    private = {id(parameter) for parameter in known.values()}
    for group in stepping.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and id(parameter) not in private:
                parameter.grad = None
                names = [name for name, p in module.named_parameters() if p is parameter]
                raise PrivacyError(
                    f"Expected every gradient that optimizer {optimizer} steps on to be private, got a raw one of "
                    f"{names[0] if names else 'a parameter that is not in the module'!r}. It became trainable within "
                    "the step: change requires_grad in on_train_epoch_start or on_train_batch_start, and register "
                    "layers in the module."
                )


def drawn(batch: Any) -> Any:
    """Return a logical batch, if the private loader drew it and no step has used it.

    Raises:
        PrivacyError: there is none.
    """
    if batch is None:
        raise PrivacyError(
            "Expected one training_step for each logical batch, got a batch that the private loader did not draw, "
            "or the same one again. Optimizers that call their closure several times cannot be used: take SGD, "
            "Adam or AdamW."
        )
    return batch


def check_released(*, seen_backprops: bool, released: Collection[int]) -> None:
    """Check, at the end of a fit, that backprops were followed by a step of a private optimizer.

    Raises:
        PrivacyError: they were not.
    """
    if seen_backprops and not released:
        raise PrivacyError(
            "Backprops arrived, but no private optimizer has ever stepped, so nothing is trained and the ledger "
            f"is empty. {USE_OPTIMIZERS}"
        )


def check_settled(now: float, settled: float) -> None:
    """Check that the sensitivity of a sum is still the one that its noise was calibrated for, or raise PrivacyError."""
    if now != settled:
        raise PrivacyError(
            f"Expected a sensitivity of {settled:.6g} as settled when the batch began, got {now:.6g}. The noise would "
            "not fit the sum: change clipping and noise between batches, in on_train_epoch_start or "
            "on_train_batch_start."
        )


def check_tried(optimizer: int, untried: Collection[int]) -> None:
    """Check that a public optimizer has stepped in a trial before its first real step, or raise PrivacyError."""
    if optimizer in untried:
        raise PrivacyError(
            f"Expected public optimizer {optimizer} to step where it was tried, got its first step on a batch whose "
            "trial did not step it. Whether it sees the data is unknown: let batch_idx alone decide when it steps."
        )


def check_same_dataset(previous: PrivateDataLoader | None, loader: PrivateDataLoader) -> None:
    """Check that the size of the training set did not change within a run, or raise PrivacyError."""
    if previous is not None and previous.facts.dataset_size != loader.facts.dataset_size:
        raise PrivacyError(
            f"Expected the training set to keep its {previous.facts.dataset_size} {loader.facts.unit}s during the run, "
            f"got {loader.facts.dataset_size}. The sample rate that the ledger holds would be wrong: keep the dataset "
            "fixed."
        )


def zero_loss(device: torch.device) -> Tensor:
    """Return a zero loss that can be back-propagated and gives no parameter a gradient."""
    return torch.zeros((), device=device, requires_grad=True)
