"""The comparison of a sample's gradient in a batch with its gradient alone, and the list of unsupported layers.

Differential privacy bounds what one sample contributes. That needs per-sample gradients which depend on one sample
only, and which are on the scale that the clipping norm is meant for. A wrong loss or layer breaks either condition
silently; the comparison detects it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_dp.errors import ComparisonError, PrivacyError
from lightning_dp.per_sample.layout import REORDERED
from lightning_dp.system.torch_private import BatchNorm, InstanceNorm

_PIECE = 2**18
"""Coordinates that are compared at a time, in float64."""
_FIX = "lightning_dp.fix(module) replaces it"
_ADDS_UP = (
    "The gradient of the whole batch is that of its samples together, so no sample influences another: the per-sample "
)
_OURS = (
    "gradient of some operation is wrong, which is ours to mend, or samples use copies of a parameter that were made "
    "for others, such as the first of the copies for all frames. Until then use grad_sample='single', and report the "
    "module."
)
_REORDERED = (
    f"gradients are {REORDERED}. Likely cause: a collate function or a step that sorts its "
    "records, by length for example. Keep their order (pack_padded_sequence takes enforce_sorted=False), or use "
    "grad_sample='single'; if nothing sorts them, report the module."
)
_SINGLE = "pass per_sample_loss=True, by which each record's own loss counts: another objective, as the statement says"


def compare_with_singles(
    batched: Mapping[str, Tensor],
    singles: Iterable[Mapping[str, Tensor]],
    *,
    scale: float = 1.0,
    rtol: float = 1e-3,
    module: nn.Module | None = None,
    adds_up: Callable[[], bool] | None = None,
    total: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    r"""Check that the per-sample gradients of a batch equal the gradients of its samples run alone.

        max_{p, i} ||scale batched_p[i] - single_i[p]||  <=  rtol * max_i ||gradient_i over all parameters||

    **Guarantee**: returns only if the inequality holds for every parameter and sample. A NaN on one side only is a
    difference; a sample that is not finite on both sides says nothing and is left out. What it does NOT show: that
    samples other than these, or other branches of the model, are independent too; couplings weaker than ``rtol``.
    The message of the error holds numbers computed from the data: it is not private.

    Args:
        batched: parameter name to per-sample gradients, shape ``(B, *shape)``, randomness off. Private.
        singles: for each of the ``B`` samples parameter name to gradient, shape ``(*shape)``, of its own loss. Private.
            A name that one side lacks counts as zero there. Asked for one by one, and freed before the next.
        scale: makes ``batched`` gradients of the sum over samples of the loss: ``B`` for a mean loss.
        rtol: allowed difference, in (0, inf).
        module: searched for layers that explain a difference.
        adds_up: whether the gradient of the whole batch is that of its samples together; asked where gradients differ,
            to tell samples that influence each other from a gradient that this package deals to the wrong sample.
        total: adds figures by parameter over the processes, where each holds a part of the gradients.

    Raises:
        ComparisonError: where the gradients differ, with the parameters, the size and the likely cause, or where no
            sample has a finite gradient.
        PrivacyError: where they differ and ``adds_up`` shows that samples are independent.
        ValueError: for arguments that do not fit together.

    Example:
        >>> grads = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> compare_with_singles({"w": grads}, [{"w": grads[0]}, {"w": grads[1]}])
    """
    if not 0 < rtol < math.inf:
        raise ValueError(f"Expected 0 < rtol < inf, got rtol={rtol}. Pass a tolerance such as 1e-3.")
    samples, sums = sums_of(batched, singles, scale)
    sums = dict(total(sums))
    totals_b, totals_s, totals_bs, _ = sum(sums.values(), torch.zeros(4, samples, dtype=torch.float64))
    comparable = totals_b.isfinite() | totals_s.isfinite()
    if samples and not bool(comparable.any()):
        raise ComparisonError(
            "Expected at least one sample with a finite gradient, got none: whether samples are independent cannot be "
            "seen. Look for NaN or infinite values in the data, the loss or the initial weights."
        )
    both = totals_b.isfinite() & totals_s.isfinite()
    largest = torch.maximum(totals_b, totals_s)[both].sqrt().max().item() if bool(both.any()) else 0.0
    worst: dict[str, tuple[float, int]] = {}
    for name, (_, _, _, squares) in sums.items():
        # NaN and inf, on one side only, are the largest possible difference
        values = torch.where(comparable, squares.sqrt().nan_to_num(nan=math.inf, posinf=math.inf), 0.0)
        if samples and not values.max().item() <= rtol * largest:
            index = int(values.argmax())
            worst[name] = (values[index].item() / largest if largest else math.inf, index)
    if worst:
        error: PrivacyError
        if adds_up is not None and adds_up():
            pairs = [(one.sqrt().sort().values, two.sqrt().sort().values) for one, two, *_ in sums.values()]
            sorts = all(torch.allclose(one, two, rtol=0.0, atol=rtol * largest) for one, two in pairs)
            error = PrivacyError(f"{_difference(worst, rtol)} {_ADDS_UP}{_REORDERED if sorts else _OURS}")
        else:
            cause = _cause(totals_b, totals_s, totals_bs, max(rtol, 1e-3))
            error = ComparisonError(f"{_difference(worst, rtol)} {cause}{_suspects(module)}")
        error.difference = max(size for size, _ in worst.values())
        raise error


def find_unsupported(module: nn.Module, *, runs_samples_alone: bool = False) -> list[tuple[str, nn.Module, str]]:
    """Return the submodules that cannot be trained privately as they are: (qualified name, module, reason).

    **Guarantee**: an empty list does not mean that samples are independent: functions inside ``forward`` are not seen.

    Args:
        module: the module to search, itself included.
        runs_samples_alone: True for ``grad_sample="single"``: list only layers that store values of samples without
            noise.

    Returns:
        One entry per submodule, in the order of ``named_modules()``; the name of the module itself is "".

    Example:
        >>> [(name, why[:9]) for name, _, why in find_unsupported(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))]
        [('1', 'BatchNorm')]
    """
    found = []
    for name, child in module.named_modules():
        why = _why_never_private(child)
        if not why and not runs_samples_alone:
            why = _why_not_together(child)
        if why:
            found.append((name, child, why))
    return found


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _why_never_private(module: nn.Module) -> str:
    """Return the reason if the layer stores values of samples without noise; "" if it does not."""
    kind = type(module).__name__
    if isinstance(module, BatchNorm) and module.training and module.running_mean is not None:
        frozen = module.weight is not None and not _trains(module)  # as in a teacher
        way_out = "its weights are frozen, so call its eval() in on_train_start" if frozen else f"{_FIX} by GroupNorm"
        return f"{kind} normalises with statistics of the batch and stores them without noise; {way_out}."
    if isinstance(module, InstanceNorm) and module.training and module.track_running_stats:
        return f"{kind} with track_running_stats=True stores statistics of samples without noise; {_FIX}."
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None and _trains(module):
        return f"{kind} with max_norm changes the weights of this batch's tokens without noise; leave max_norm out."
    return ""


def _why_not_together(module: nn.Module) -> str:
    """Return the reason why samples may not share a forward through this layer; "" if they may."""
    kind = type(module).__name__
    alone = getattr(module, "normalises_samples_alone", False)  # of a subclass that `fix` has changed
    if isinstance(module, BatchNorm) and not alone and (_trains(module) or module.running_mean is None):
        return f"{kind} normalises with statistics of the batch when it trains; {_FIX} by GroupNorm."
    if not _trains(module):
        return ""
    if isinstance(module, InstanceNorm) and module.track_running_stats:
        return f"{kind} with track_running_stats=True stores statistics of samples when it trains; {_FIX}."
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq:
        return f"{kind} with scale_grad_by_freq=True divides by counts over the batch; leave it out."
    return ""


def sums_of(
    batched: Mapping[str, Tensor], singles: Iterable[Mapping[str, Tensor]], scale: float
) -> tuple[int, dict[str, Tensor]]:
    """Return B, and by parameter ``(4, B)``: squared norms of both gradients, inner product, squared distance."""
    rows: dict[str, dict[int, Tensor]] = {}
    samples = 0
    for single in singles:
        for name in dict.fromkeys([*batched, *single]):
            left, right = batched.get(name), single.get(name)
            if left is not None and samples >= left.shape[0]:
                continue  # too few of them: said below
            one = left[samples] if left is not None else torch.zeros_like(single[name])
            other = right if right is not None else torch.zeros_like(one)
            if one.shape != other.shape:
                raise ValueError(
                    f"Expected batched[{name!r}][{samples}] of shape {tuple(other.shape)}, as its single has, "
                    f"got shape={tuple(one.shape)}."
                )
            rows.setdefault(name, {})[samples] = _pair_sums(one.detach(), other.detach().to(one.device), scale)
        samples += 1
        del single
    for name, left in batched.items():
        if left.shape[0] != samples:
            raise ValueError(
                f"Expected batched[{name!r}] of shape {(samples, *left.shape[1:])} for {samples} singles, "
                f"got shape={tuple(left.shape)}."
            )
    none = torch.zeros(4, dtype=torch.float64)
    sums = {name: torch.stack([found.get(i, none) for i in range(samples)], 1) for name, found in rows.items()}
    return samples, sums


def _pair_sums(batched: Tensor, alone: Tensor, scale: float) -> Tensor:
    """Return two gradients' squared norms, inner product and squared distance: ``(4,)``, float64, on the CPU."""
    if batched.device.type == "mps":  # has no float64
        batched, alone = batched.cpu(), alone.cpu()
    total = torch.zeros(4, dtype=torch.float64, device=batched.device)
    pieces = (torch.split(side.reshape(-1), _PIECE) for side in (batched, alone))
    for left, right in zip(*pieces, strict=True):
        left, right = left.to(torch.float64) * scale, right.to(torch.float64)
        distance = (left - right).square().sum()
        total += torch.stack([left.square().sum(), right.square().sum(), (left * right).sum(), distance])
    return total.cpu()


def _difference(worst: Mapping[str, tuple[float, int]], rtol: float) -> str:
    ranked = sorted(worst.items(), key=lambda item: -item[1][0])
    listed = ", ".join(f"{name} ({size:.2g}, sample {index})" for name, (size, index) in ranked[:4])
    listed += f" and {len(ranked) - 4} more" if len(ranked) > 4 else ""
    return (
        "Expected the gradient of every sample in a batch to be its gradient when run alone, got a difference of "
        f"{ranked[0][1][0]:.2g} of the largest gradient norm (allowed {rtol:.2g}) in {listed}."
    )


def _cause(totals_b: Tensor, totals_s: Tensor, totals_bs: Tensor, tolerance: float) -> str:
    """Return the likely cause of a difference, judged by the ratios of batched to single gradients."""
    samples, finite = len(totals_b), totals_s.isfinite()
    if lost := int((totals_b.isfinite() & ~finite).sum()):
        return (
            f"{lost} of {samples} samples have no finite gradient when run alone: the step divides by a spread over "
            "the batch, such as std(), as of normalised advantages. Use public constants, or normalise before fit."
        )
    totals_b, totals_s, totals_bs = (totals[finite & totals_b.isfinite()] for totals in (totals_b, totals_s, totals_bs))
    largest = float(totals_b.max()) if len(totals_b) else 0.0
    missed = int(((totals_b <= tolerance**2 * largest) & (totals_s > tolerance * largest)).sum())
    if 0 < missed < len(totals_b):
        return (
            f"{missed} of {len(totals_b)} samples have a gradient when run alone and none in the batch: which samples "
            "count depends on the others. Likely causes: rows that are drawn or chosen from the whole batch, such as "
            f"random windows or hard examples. Draw from each record by itself, or {_SINGLE}."
        )
    added = int(((totals_s <= tolerance**2 * largest) & (totals_b > tolerance * largest)).sum())
    if 0 < added < len(totals_s):
        return (
            f"{added} of {len(totals_s)} samples have a gradient in the batch and none when run alone: the others "
            "decide how much a sample counts. Likely causes: weights from counts of the batch, such as pos_weight; "
            "values less their mean over the batch. Use constants that are public, for these weights or means."
        )
    used = (totals_s > 0) & (totals_b > 0)
    batched, alone, product = (totals[used] for totals in (totals_b, totals_s, totals_bs))
    ratios = product / alone
    # the part of a batched gradient that is not along the single one
    rest = (batched - product.square() / alone).clamp_min(0).sqrt() / batched.sqrt()
    if len(ratios) == 0 or not bool((rest <= 10 * tolerance).all()):
        return (
            "No factor per sample explains it: samples influence each other. Likely causes: BatchNorm or another layer "
            "with statistics over the batch; attention, mixup, a contrastive loss or another term between samples; "
            "padding to the longest sample that no mask hides; one of several terms that is a mean over known labels "
            "or unmasked entries alone (per_sample_loss=True counts each record's own loss); a layout whose first "
            "axis is not the batch; randomness that is drawn in forward; a hook or a backward that rounds or clips "
            "gradients of the batch's loss; rounding that a division by a small number enlarges (see whether "
            "precision='64-true' ends it). Mask the padding, or change the layer or the loss."
        )
    low, high, middle = ratios.min().item(), ratios.max().item(), ratios.mean().item()
    if high - low <= 10 * tolerance * abs(middle):
        if abs(middle - samples) <= 10 * tolerance * samples:
            return (
                f"All gradients are {middle:.4g} times as large, and the batch has {samples} samples: the loss is a "
                "sum over the batch, not a mean. Pass loss_reduction='sum', or return a mean or a loss of shape (B,)."
            )
        if abs(middle - 1) <= 10 * tolerance:
            return (
                "Direction and size of each gradient nearly agree: an operation computes with less precision in a "
                "batch than on one sample, or samples share a small part of the loss, such as a denominator or a "
                "choice by a mean over the batch. per_sample_loss=True counts each record's own loss."
            )
        return (
            f"All gradients are {middle:.4g} times as large (batch of {samples}): the loss is divided by something "
            "that depends on the batch's size, or on a count of some of its samples. Return a mean over all "
            "samples, or a loss of shape (B,)."
        )
    if low < 0 < high:
        return (
            f"Every gradient has a factor of its own, from {low:.4g} to {high:.4g}: the step trains a function of the "
            f"whole batch's loss, such as its square or logarithm. Apply it to each sample's own loss, or {_SINGLE}."
        )
    return (
        f"Every gradient has the right direction but a factor of its own, from {low:.4g} to {high:.4g}: samples share "
        "a denominator or another function of the batch. Likely causes: a mean over all tokens or pixels of the batch "
        "instead of each sample's own; ignore_index, sample or class weights in a mean; the square or logarithm of the "
        f"batch's loss. Reduce each sample by itself and return a loss of shape (B,), or {_SINGLE}."
    )


def _suspects(module: nn.Module | None) -> str:
    found = [] if module is None else find_unsupported(module)
    listed = " ".join(f"{name or 'the module itself'}: {why}" for name, _, why in found[:3])
    return f" Found in the module: {listed}" if found else ""
