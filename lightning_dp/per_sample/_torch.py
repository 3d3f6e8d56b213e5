"""Private API of torch that per-sample gradients need, each behind one function of ours."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def real_view(tensor: Tensor) -> Tensor:
    """Return a complex tensor as real numbers, with a last axis for real and imaginary part; any other unchanged.

    Example:
        >>> real_view(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


unreported: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass
"""Returns a context in which tracked tensors do not see the operations on them."""

unfollowed: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Returns a context in which neither tracked tensors nor torch function modes see operations."""


number_in: Callable[[Tensor], Any] = Tensor.item
"""Returns the number in a tensor of one entry, as ``item``, also while others watch what user code reads."""

array_of: Callable[[Tensor], Any] = Tensor.numpy
"""Returns the values of a tensor as an array over the same memory, as ``numpy``, without being watched."""


def innermost_mode() -> object:
    """Return the torch function mode that is called first; None if there is none."""
    mode: object = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
    return mode


def in_backward() -> bool:
    """Tell whether autograd is running a backward. A forward at that time is a recomputation (checkpointing)."""
    return backward_number() != -1


backward_number: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the backward that autograd runs now; -1 if it runs none."""

num_operations: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""Returns the number of differentiable operations that this thread has run so far."""


def keeps_graph() -> bool:
    """Tell whether the current backward keeps, or may keep, its graph for another backward (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def frame_above(number: int) -> FrameType:
    """Return the frame of the caller, or one so many frames above it."""
    return sys._getframe(number + 1)


def known_to_scripts(function: Callable[..., Any], like: Callable[..., Any]) -> None:
    """Let scripts that are compiled from now on take a function for another one of torch, if they know that one."""
    table = torch.jit._builtins._get_builtin_table()  # type: ignore[no-untyped-call]
    if id(like) in table:
        table[id(function)] = table[id(like)]


def adds_to_leaves() -> bool:
    """Tell whether the current backward adds to the gradients of leaves: ``torch.autograd.grad`` does not.

    A backward that runs on another thread than its caller (of a GPU) counts as one that does.
    """
    asked, added = torch.autograd.grad.__code__, torch.autograd.backward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not asked and frame.f_code is not added:
        frame = frame.f_back
    return frame is None or frame.f_code is added


def custom_call() -> tuple[Any, tuple[Any, ...]] | None:
    """Return the ``torch.autograd.Function`` whose ``forward`` is running, and its arguments; None if there
    is none.
    """
    code: Any = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    given = frame.f_locals
    return given["cls"], (*given["args"], *given["kwargs"].values())


def is_view(tensor: Tensor) -> bool:
    """Tell whether autograd counts a tensor as a view of another tensor."""
    return tensor._is_view()


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor that autograd counts a tensor as a view of; None if it is no view."""
    base: Tensor | None = tensor._base
    return base


def is_mapped(tensor: Tensor) -> bool:
    """Tell whether ``torch.func`` has wrapped a tensor: within ``vmap`` one tensor stands for a batch of them."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def in_transform() -> bool:
    """Tell whether a function runs within ``vmap`` or another transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_dual() -> bool:
    """Tell whether a function runs within forward-mode differentiation, which functions of autograd need a rule for."""
    return torch.autograd.forward_ad._current_level >= 0


def own_view(tensor: Tensor) -> Tensor:
    """Return an alias of a tensor that autograd does not count as a view."""
    alone: Tensor = torch.ops.aten._unsafe_view.default(tensor, tensor.shape)
    return alone


def arguments_of(func: Any) -> tuple[str, list[Any]]:
    """Return the bare name of a dispatched operation (no ``aten::``, no trailing ``_``) and its declared arguments."""
    return func._schema.name.removeprefix("aten::").rstrip("_"), list(func._schema.arguments)


def is_compiled(code: Any) -> bool:
    """Tell whether ``torch.compile`` was applied to a function or a module, by a wrapper, in place or by Lightning."""
    if isinstance(code, FunctionType):
        return hasattr(code, "_torchdynamo_orig_callable") and not getattr(code, "_torchdynamo_disable", False)
    marks = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    return any(getattr(code, name, None) is not None for name in marks)


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled code runs eagerly; code that is called under a mode would else stay eager."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return nullcontext() if frames is None else _eager(frames)


@functools.cache
def _eager(frames: Any) -> _Eager:
    return _Eager(frames)


class _Eager:
    """``torch.compiler.set_stance("force_eager")`` in a tenth of its time, since every step enters it."""

    def __init__(self, frames: Any) -> None:
        self._frames, self._stance = frames, frames.DynamoStance("force_eager")
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before.append(self._frames._stance)
        self._frames._stance = self._stance

    def __exit__(self, *error: object) -> None:
        self._frames._stance = self._before.pop()


class UnrolledMaps:
    """A context in which ``torch.vmap`` over certain tensors calls its function once per entry of the mapped axis.

    Operations on such an entry then report themselves, which those within a map do not.

    Args:
        reports: tells whether a tensor reports its operations.
    """

    def __init__(self, reports: Callable[[Any], bool]) -> None:
        self._reports = reports

    def __enter__(self) -> None:
        self._before: Any = torch._functorch.vmap._flat_vmap
        torch._functorch.vmap._flat_vmap = self._mapped  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        torch._functorch.vmap._flat_vmap = self._before

    def _mapped(
        self, func: Any, size: int, in_dims: Any, args: Any, spec: Any, out_dims: Any, randomness: str, **kwargs: Any
    ) -> Any:
        mapped = [axis is not None and self._reports(one) for axis, one in zip(in_dims, args, strict=True)]
        if not any(mapped) or randomness == "same":
            return self._before(func, size, in_dims, args, spec, out_dims, randomness, **kwargs)
        found = []
        for entry in range(size):
            own = [one if axis is None else one.select(axis, entry) for axis, one in zip(in_dims, args, strict=True)]
            found.append(pytree.tree_flatten(func(*pytree.tree_unflatten(own, spec), **kwargs)))
        axes = pytree._broadcast_to_and_flatten(out_dims, found[0][1]) or []
        parts = zip(*(leaves for leaves, _ in found), strict=True)
        whole = [each[0] if axis is None else torch.stack(each, axis) for axis, each in zip(axes, parts, strict=True)]
        return pytree.tree_unflatten(whole, found[0][1])


def add_scaled(targets: list[Tensor], tensors: list[Tensor], factor: float) -> None:
    """Add ``factor * tensor`` to each target, in one call."""
    if tensors:
        torch._foreach_add_(targets, tensors, alpha=factor)


def flattened(tensors: list[Tensor]) -> Tensor:
    """Return the elements of tensors of any shapes in one vector, in one call."""
    joined: Tensor = torch._C._nn.flatten_dense_tensors(tensors)
    return joined


def fused_kernel(kind: str) -> Callable[..., Any]:
    """Return torch's fused recurrent kernel with a given name, such as ``"lstm"``."""
    kernel: Callable[..., Any] = getattr(torch._VF, kind)
    return kernel


def memory_of(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; -1 for all sparse tensors, which have several, and for tensors that hold
    their values in others, as those of a sharded parameter do.
    """
    try:
        return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else -1
    except RuntimeError:
        return -1


def is_sparse(tensor: Tensor) -> bool:
    """Tell whether a tensor holds some of its entries only."""
    return len(dense_parts_of(tensor)) > 1


def dense_parts_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the dense tensors that a sparse one consists of, in its memory, its values last; else the tensor."""
    if tensor.layout is torch.strided:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def places_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every entry of a sparse matrix, in the order of its values.

    Raises:
        ValueError: it is no sparse matrix of single entries.

    Example:
        >>> places_of(torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse())
        (tensor([0, 1]), tensor([1, 0]))
    """
    first, *others, values = dense_parts_of(matrix)
    if not others and len(first) == 2:
        return first[0], first[1]
    if not others or matrix.dim() != 2 or values.dim() != 1:
        raise ValueError(f"Expected a sparse matrix, got layout={matrix.layout} and {matrix.dim()} axes.")
    counted = torch.arange(len(first) - 1, device=first.device).repeat_interleave(first.diff())
    return (counted, others[0].long()) if matrix.layout is torch.sparse_csr else (others[0].long(), counted)


class TensorSet:
    """A set of tensors by identity that does not keep them alive.

    Example:
        >>> one, other = torch.zeros(2), torch.zeros(2)
        >>> held = TensorSet()
        >>> held.add(one)
        >>> one in held, other in held
        (True, False)
    """

    def __init__(self) -> None:
        self._held: dict[int, weakref.ref[Tensor]] = {}
        self.is_empty = True
        """True until the first tensor is added."""

    def add(self, *tensors: Tensor) -> None:
        """Add tensors."""
        for tensor in tensors:
            self.is_empty = False
            self._held[id(tensor)] = weakref.ref(tensor)

    def __contains__(self, tensor: Tensor) -> bool:
        held = self._held.get(id(tensor))
        return held is not None and held() is tensor
