"""GradientEngine: the interface of a private step to per-sample gradients, however they are computed.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.precision import exact_arithmetic


class GradientEngine(ABC):
    """Norms and weighted sums of the gradients of every sample of a microbatch.

    **Guarantee**: between :meth:`begin` and :meth:`end` no raw gradient stays in a private parameter's ``.grad``;
    ``gradient_i`` is the gradient of the loss as back-propagated with respect to what sample i's rows contributed. A
    sample with factor 0 contributes exactly zero, whatever it holds. Everything returned is private.
    """

    listening: bool
    """Whether backwards count; switch off around a backward that is not the loss's (adversarial examples)."""

    _parameters: dict[str, nn.Parameter]

    @property
    @abstractmethod
    def has_layout(self) -> bool:
        """True if the engine knows which axis of every use of a private parameter runs over the samples."""

    @abstractmethod
    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook; a second call does nothing."""

    @abstractmethod
    def set_parameters(self, parameters: Mapping[str, nn.Parameter], gathered: Collection[str] = ()) -> None:
        """Set the private parameters: qualified name (the first of ``named_parameters``) to parameter.

        Args:
            parameters: the tensors of the forward.
            gathered: names of those that the module holds during its forward alone, as sharded modules do.

        Raises:
            PrivacyError: a parameter is not one of the module.
        """

    @abstractmethod
    def learn_layout(
        self, run: Callable[[int], object], sizes: tuple[int, int] = (2, 5), *, more: bool = False, alike: bool = False
    ) -> None:
        """Infer which axis of every use of a private parameter runs over the samples, from runs at two sizes.

        Args:
            run: executes the user's forward on that many samples. The smaller batch must be the beginning of the
                larger one, padded alike, with random layers off; a backward is allowed. It is called two to about
                ten times.
            sizes: two different sizes, at least 2.
            more: keep what was learned before, and add what these runs use beyond it.
            alike: whether these samples have equal shapes, so that they do not show whether others have as many rows.

        Raises:
            PrivacyError: the samples that a private parameter meets cannot be distinguished.
        """

    @abstractmethod
    def see(self, batch: Any) -> None:
        """Record the batch that the user's step is about to run on, because its rows have owners.

        Args:
            batch: collated and on its device.

        Raises:
            PrivacyError: an index of owners that does not fit the number of samples.
        """

    @abstractmethod
    def begin(self, batch_size: int, owners: Tensor | None = None) -> None:
        """Start a microbatch: forget the previous one and record uses from now on.

        Args:
            batch_size: records in it.
            owners: of each record, the position of its user, ascending: then a sample is a user, and its gradient the
                sum of those of its records. ``None``: each record is a sample.
        """

    @abstractmethod
    def discard(self, names: Iterable[str] | None = None) -> None:
        """Forget the backprops received so far for these parameters (None: all), as ``zero_grad`` does."""

    @abstractmethod
    def has_backprops(self, names: Iterable[str]) -> bool:
        """Tell whether a backprop is waiting for any of these parameters."""

    def recomputed(self) -> set[str]:
        """Return the parameters whose values are read again after the backward, to pull gradients back."""
        return set()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the private parameters in the forward."""
        return {parameter.dtype for parameter in self._parameters.values()}

    @abstractmethod
    def accept_grads(self, names: Iterable[str]) -> None:
        """Accept a ``.grad`` of these parameters within a microbatch, because it is the private one."""

    @abstractmethod
    def check_tracked(self) -> None:
        """Check, after a backward, that every use of a private parameter was recorded.

        Raises:
            PrivacyError: a private parameter got a ``.grad`` of its own (it is reset first), or the input of a
                recorded call was modified in place.
        """

    @abstractmethod
    def end(self) -> None:
        """Free everything; until the next :meth:`begin` the module trains as without an engine."""

    @abstractmethod
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        """Return the squared norm of every sample's gradient over each group of parameters.

        Args:
            groups: names of the parameters of each group.
            masks: of parameters of which the active coordinates alone count.

        Returns:
            Shape ``(G, B)``, float32 (float64 if a private parameter is). Not finite where a gradient is not. Private.
            Where :meth:`accumulate` takes another way to the gradient, the rounding between the two ways is in the
            norm: what a sample adds is never longer than its factor times its norm, to 1e-5, also where the parts of
            its gradient cancel.
        """

    @abstractmethod
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add ``sum_i factors[g, i] * gradient_i`` to ``out[name]`` for every parameter of every group g.

        Args:
            factors: shape ``(G, B)``, finite. A factor of 0 drops the sample, even a non-finite one.
            groups: names of the parameters of each group.
            out: accumulation targets by parameter name: of the parameter's shape, or 1-D over the active coordinates if
                the parameter has a mask.
            masks: as for :meth:`squared_norms`.
            scratch: buffers of the shape of masked parameters and of the type of ``out``, for sums of which the active
                entries are then taken; they may be overwritten. Allocated if None.
        """

    @abstractmethod
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the gradient of every sample, shape ``(B, *shape)`` per parameter; zeros where no backprop arrived.
        Private.
        """

    def _new_norms(self, num_groups: int, batch_size: int) -> Tensor:
        """Return zeros in the type and on the device of the norms, shape ``(G, B)``."""
        parameters = list(self._parameters.values())
        double = any(parameter.dtype == torch.float64 for parameter in parameters)
        device = parameters[0].device if parameters else None
        return torch.zeros(num_groups, batch_size, dtype=torch.float64 if double else torch.float32, device=device)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return exact_arithmetic(next((p.device.type for p in self._parameters.values()), "cpu"))
