"""Owners of the result of an operation that computes over some axes: they stay where theirs is not among these."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dp.per_sample.owners.axes import AXES, REDUCING, first_of
from lightning_dp.per_sample.owners.entries import after_sort
from lightning_dp.per_sample.owners.memo import Memo, merged
from lightning_dp.per_sample.owners.owned import MIXED, Mixed, Owners, Rows
from lightning_dp.per_sample.tracking.arguments import tensors_in


class Step(NamedTuple):
    """One operation that has run.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: the same, by name.
        out: its result.
        owned: tensors that hold data, with their owners.
        identity: ``0 ... B - 1``.
        memo: of the microbatch.
    """

    func: Any
    args: Any
    kwargs: Any
    out: Any
    owned: list[tuple[Tensor, Rows]]
    identity: Tensor
    memo: Memo


Found = Owners | list[Owners]


def alone(step: Step) -> tuple[Tensor, Rows] | None:
    """Return the only tensor with data, and its owners; None if there are several."""
    return step.owned[0] if len(step.owned) == 1 else None


def entry_by_entry(step: Step) -> Found:
    """Return the owners of a result whose entries are computed one by one, with broadcasting."""
    return merged([(tensor.dim(), rows) for tensor, rows in step.owned], first_of(step.out).dim(), step.memo)


def _broadcast(step: Step) -> Found:
    """Return the owners of each tensor after all were expanded to one shape."""
    by_id = {id(tensor): rows for tensor, rows in step.owned}
    pairs = [
        (by_id.get(id(one)), out.dim() - one.dim())
        for one, out in zip(tensors_in(step.args, {}), step.out, strict=True)
    ]
    return [rows if rows is None or rows.axis is None else rows.moved(rows.axis + more) for rows, more in pairs]


def positions(step: Step) -> Found:
    """Return the owners of the positions at which a tensor is not zero: those of the entries there."""
    found = alone(step)
    if found is None or found[1].axis is None:
        return MIXED
    columns = step.out.unbind(1) if isinstance(step.out, Tensor) else step.out
    return Rows(0, found[1].index[columns[found[1].axis]])


def where(step: Step) -> Found:
    """Return the owners after ``where``, which finds positions if it is given a condition alone."""
    return positions(step) if isinstance(step.out, tuple) else entry_by_entry(step)


def _reduced(step: Step) -> Found:
    """Return the owners after a reduction: unchanged if the reduced axes do not include theirs."""
    name = step.func.__name__.rstrip("_")
    if len(step.owned) > 1 or (len(step.args) > 1 and isinstance(step.args[1], Tensor)):
        return entry_by_entry(step)
    tensor, rows = step.owned[0]
    if rows.axis is None:
        return rows
    at = AXES[name](tensor, rows.axis, step.args, step.kwargs, step.out)
    if at is not None:
        return rows.moved(at)
    if name == "sort" and tensor.dim():
        return after_sort(rows.labels(tensor.shape), step.args, step.kwargs, step.out, step.memo.shared)
    return MIXED if rows.sole is None else Rows(None, rows.index.new_tensor([rows.sole]))


def _running(step: Step) -> Found:
    """Return the owners of running sums: mixed along the axis of the owners, but of numbers of rows said to be such."""
    found = _reduced(step)
    return Mixed("cumsum", is_running=True) if found is MIXED and _counts_rows(step) else found


def _counts_rows(step: Step) -> bool:
    """Tell whether a tensor holds, for each sample, how many rows of it the batch has; entries of nobody are free.

    Running sums of other numbers would pass on what only a rare record has.
    """
    numbers, rows = step.owned[0]
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.is_complex():
        return False
    somebody = rows.index >= 0
    numbers, owners, size = numbers[somebody], rows.index[somebody], len(step.identity)
    return any(torch.equal(known.index.bincount(minlength=size)[owners], numbers) for known in step.memo.known)


def matmul(step: Step) -> Found:
    """Return the owners of a product of dense tensors."""
    left, right = (step.args[1], step.args[0]) if step.func.__name__ == "__rmatmul__" else step.args[:2]
    num_axes, aligned = first_of(step.out).dim(), []
    for tensor, rows in step.owned:
        assert rows.axis is not None
        is_left, axes = tensor is left, tensor.dim()
        if tensor is left and tensor is right:
            return MIXED
        summed = axes - 1 if is_left or axes == 1 else axes - 2
        if rows.axis == summed:
            return MIXED
        lost = 1 if (right if is_left else left).dim() == 1 else 0  # the other one's vector has no axis in the result
        if not is_left and lost and rows.axis == axes - 1:
            aligned.append(rows.moved(num_axes - 1))
        else:
            aligned.append(rows.moved(num_axes + (lost if is_left or rows.axis < axes - 2 else 0) - axes + rows.axis))
    return merged([(num_axes, rows) for rows in aligned], num_axes, step.memo)


def _without_dots(equation: str, operands: list[Tensor]) -> str:
    """Return an equation with a letter for each axis that an ellipsis names."""
    terms = equation.split("->")[0].split(",")
    widths = [one.dim() - len(term) + 3 for term, one in zip(terms, operands, strict=True) if "..." in term]
    letters = "".join([letter for letter in ascii_letters if letter not in equation][: max(widths, default=0)])
    named = [
        term.replace("...", letters[len(letters) - one.dim() + len(term) - 3 :])
        for term, one in zip(terms, operands, strict=True)
    ]
    return f"{','.join(named)}->{equation.split('->')[1].replace('...', letters)}"


def _einsum(step: Step) -> Found:
    equation, *operands = step.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = [*operands[0]]
    if not isinstance(equation, str) or "->" not in equation:
        return MIXED
    given, result = _without_dots(equation.replace(" ", ""), operands).split("->")
    terms, aligned = given.split(","), []
    for tensor, rows in step.owned:
        for term, operand in zip(terms, operands, strict=True):
            if operand is tensor:
                assert rows.axis is not None
                letter = term[rows.axis]
                if letter not in result:
                    return MIXED
                aligned.append((len(result), rows.moved(result.index(letter))))
    return merged(aligned, len(result), step.memo)


def _tensordot(step: Step) -> Found:
    """Return the owners after a product summed over some axes: the left tensor's other axes come first."""
    found = alone(step)
    left, right = step.args[:2]
    over = step.kwargs.get("dims", step.args[2] if len(step.args) > 2 else 2)
    if found is None or left is right or isinstance(over, Tensor):
        return MIXED
    if isinstance(over, int):
        over = [*range(left.dim() - over, left.dim())], [*range(over)]
    tensor, rows = found
    lost = [{axis % one.dim() for axis in axes} for one, axes in zip((left, right), over, strict=True)]
    here = lost[tensor is right]
    if rows.axis is None or rows.axis in here:
        return MIXED
    before = sum(axis not in here for axis in range(rows.axis))
    return rows.moved(before + (left.dim() - len(lost[0]) if tensor is right else 0))


def _compared(step: Step) -> Found:
    """Rows compared, or multiplied, along one axis."""
    axes, out = max(tensor.dim() for tensor in tensors_in(step.args, step.kwargs)), first_of(step.out)
    at, default = _COMPARING[step.func.__name__]
    over = step.kwargs.get("dim", step.args[at] if at and len(step.args) > at else default)
    found = merged([(tensor.dim(), rows) for tensor, rows in step.owned], axes, step.memo)
    if not isinstance(over, int) or not isinstance(found, Rows) or found.axis is None or found.axis == over % axes:
        return MIXED
    return found.moved(found.axis - (out.dim() < axes and over % axes < found.axis))


def _bucketized(step: Step) -> Found:
    """Return the owners of the places of values between boundaries that hold no data."""
    found = alone(step)
    return found[1] if found is not None and found[0] is step.args[0] else MIXED


def _losses_of_rows(step: Step) -> Found:
    """Return the owners of one loss per row, without a reduction over rows."""
    first, out = step.args[0], step.out
    per_row = out.dim() == first.dim() - 1 > 0 and all(rows.axis == 0 for _, rows in step.owned)
    return merged([(out.dim(), rows) for _, rows in step.owned], out.dim(), step.memo) if per_row else MIXED


def _unpooled(step: Step) -> Found:
    """Images, and the places that their entries go to or come from, of the same samples."""
    found = entry_by_entry(step)
    return found if isinstance(found, Rows) and found.axis == 0 else MIXED


def _stacked(step: Step) -> Found:
    """Stacks of matrices: the first axis of each goes through them."""
    found = entry_by_entry(step)
    alike = all(tensor.dim() == 3 for tensor, _ in step.owned)
    return found if alike and isinstance(found, Rows) and found.axis == 0 else MIXED


def _of_matrices(step: Step) -> Found:
    """Return the owners after a function of the last two axes, which computes with each matrix by itself."""
    axes = max(tensor.dim() for tensor, _ in step.owned)
    alike = all(tensor.dim() == axes for tensor, _ in step.owned) and first_of(step.out).dim() <= axes
    found = merged([(axes, rows) for _, rows in step.owned], axes, step.memo) if alike else MIXED
    return found if isinstance(found, Rows) and (found.axis or 0) < axes - 2 else MIXED


def _attention(step: Step) -> Found:
    found = entry_by_entry(step)
    return found if isinstance(found, Rows) and (found.axis or 0) < first_of(step.out).dim() - 2 else MIXED


_COMPARING: dict[str, tuple[int | None, int | None]] = {
    "cosine_similarity": (2, 1),
    "pairwise_distance": (None, -1),
    "linalg_vecdot": (None, -1),
    "linalg_cross": (None, -1),
    "cross": (2, None),
}
"""Operations along one axis of two tensors: position of the argument that names it, and its default."""

_OF_MATRICES = """
    linalg_solve_triangular linalg_solve linalg_inv inverse linalg_cholesky cholesky cholesky_solve linalg_matrix_exp
    matrix_exp linalg_matrix_power linalg_det det logdet linalg_slogdet slogdet linalg_eigh linalg_qr linalg_svd
    linalg_pinv pinverse matrix_power linalg_eigvalsh linalg_svdvals linalg_inv_ex linalg_cholesky_ex
"""

_LOSSES_OF_ENTRIES = """
    mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits
    soft_margin_loss poisson_nll_loss margin_ranking_loss hinge_embedding_loss
"""
_LOSSES_OF_ROWS = "cross_entropy nll_loss multi_margin_loss multilabel_margin_loss cosine_embedding_loss"

HANDLERS: dict[str, Callable[[Step], Found]] = {
    **dict.fromkeys(REDUCING, _reduced),
    "cumsum": _running,
    "bmm": matmul,
    **dict.fromkeys(("max_unpool1d", "max_unpool2d", "max_unpool3d", "grid_sampler"), _unpooled),
    **dict.fromkeys(("nonzero", "argwhere"), positions),
    "where": where,
    "broadcast_tensors": _broadcast,
    "bucketize": _bucketized,
    **dict.fromkeys(_COMPARING, _compared),
    "einsum": _einsum,
    "tensordot": _tensordot,
    "baddbmm": _stacked,
    **dict.fromkeys(_OF_MATRICES.split(), _of_matrices),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(_LOSSES_OF_ENTRIES.split(), entry_by_entry),  # a reduced one has no axis left for owners
    **dict.fromkeys(_LOSSES_OF_ROWS.split(), _losses_of_rows),
}
