"""The interface between a private step and the engines that compute per-sample gradients.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.precision import exact_arithmetic


class SampleGradients(ABC):
    """The interface through which norms and weighted sums of the gradients of B samples are read.

    **Guarantee**: a sample with factor 0 contributes exactly zero, even if its gradient is not finite. Returned norms
    and gradients are not private: they are computed from the data without noise.
    """

    _parameters: dict[str, nn.Parameter]

    @abstractmethod
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        """Return the squared norm of every sample's gradient over each group of parameters.

        Args:
            groups: names of the parameters of each group.
            masks: masks by parameter name. Only the active coordinates of a masked parameter count.

        Returns:
            Shape ``(G, B)``, float32 (float64 if a private parameter is). Not finite if the gradient is not. Not
            private. If :meth:`accumulate` computes the gradient in another way, the norm includes a bound on the
            rounding between the two ways. A sample's contribution is therefore never longer than its factor times its
            norm, to 1e-5, even if the terms of its gradient cancel.
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
            scratch: by name, one buffer of the full shape per masked parameter, in the dtype of ``out``. The full sum
                is written there before its active entries are taken. Allocated if None.
        """

    @abstractmethod
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return every sample's gradient per parameter, shape ``(B, *shape)``; zero if no backprop arrived. Not
        private.
        """

    def _new_norms(self, num_groups: int, batch_size: int) -> Tensor:
        """Return zeros in the type and on the device of the norms, shape ``(G, B)``."""
        parameters = list(self._parameters.values())
        double = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in parameters)
        device = parameters[0].device if parameters else None
        return torch.zeros(num_groups, batch_size, dtype=torch.float64 if double else torch.float32, device=device)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return exact_arithmetic(next((p.device.type for p in self._parameters.values()), "cpu"))


class GradientEngine(SampleGradients):
    """The interface of engines that compute norms and weighted sums of a microbatch's per-sample gradients.

    **Guarantee**: between :meth:`begin` and :meth:`end` no raw gradient stays in a private parameter's ``.grad``.
    ``gradient_i`` is the part of the back-propagated gradient that comes from the rows of sample i.
    """

    listening: bool
    """True if backprops are recorded; set to False around a backward that is not the loss's (adversarial examples)."""
    joined: frozenset[int | tuple[int, ...]] = frozenset()
    """Lengths of axes of the batch along which parts of unequal length may be joined, and shapes of tensors that have
    such a length because records are stacked in them. The position of a row on another axis of that length does not
    tell which record it belongs to."""

    @property
    def most_kept(self) -> int:
        """Largest number of samples to take, to be clipped together; 0 if the engine clips whole microbatches."""
        return 0

    def take(self) -> Any:
        """Return the gradient of the one sample of this microbatch, and forget it."""
        raise NotImplementedError

    def taken(self, samples: Sequence[Any]) -> SampleGradients:
        """Return the gradients of samples that were taken, to clip them together."""
        raise NotImplementedError

    @property
    @abstractmethod
    def has_layout(self) -> bool:
        """True if the engine knows, for every use of a private parameter, how the rows belong to samples."""

    @abstractmethod
    def attach(self) -> None:
        """Register the hooks; a second call does nothing."""

    @abstractmethod
    def detach(self) -> None:
        """Remove every hook; a second call does nothing."""

    @abstractmethod
    def set_parameters(self, parameters: Mapping[str, nn.Parameter], gathered: Collection[str] = ()) -> None:
        """Set the private parameters, by qualified name (the first one in ``named_parameters``).

        Args:
            parameters: the private parameters that the forward uses.
            gathered: names of the parameters that the module holds only during its forward, as sharded modules do.

        Raises:
            PrivacyError: a parameter is neither in the module nor gathered.
        """

    @abstractmethod
    def learn_layout(
        self, run: Callable[[int], object], sizes: tuple[int, int] = (2, 5), *, more: bool = False, alike: bool = False
    ) -> None:
        """Infer, from runs at two batch sizes, which axis runs over the samples in every use of a private parameter.

        Args:
            run: executes the user's forward on that many samples. The smaller batch must be the beginning of the
                larger one, padded alike, with random layers off; a backward is allowed. It is called at least twice
                and at most 27 times.
            sizes: two different sizes, at least 2.
            more: add the uses of these runs to the layout learned before, instead of replacing it.
            alike: whether these samples have equal shapes. If so, the runs do not show whether all records have
                equally many rows.

        Raises:
            PrivacyError: the samples cannot be distinguished in some use of a private parameter.
        """

    @abstractmethod
    def see(self, batch: Any) -> None:
        """Record the batch of the next user step, to know the owner of each row.

        Args:
            batch: collated and on its device.

        Raises:
            PrivacyError: an index of owners does not fit the number of samples.
        """

    @abstractmethod
    def begin(self, batch_size: int, owners: Tensor | None = None) -> None:
        """Start a microbatch: forget the previous one and record uses from now on.

        Args:
            batch_size: number of records in the microbatch.
            owners: position of each record's user, ascending. Each user is then one sample, whose gradient is the sum
                of the gradients of its records. ``None``: each record is a sample.
        """

    @abstractmethod
    def discard(self, names: Iterable[str] | None = None) -> None:
        """Forget the backprops received so far for these parameters (None: all), as ``zero_grad`` does."""

    def take_written(self, names: Iterable[str]) -> None:
        """Take gradients of parameters that user code wrote to ``.grad`` by itself, if it can see one sample alone."""

    @abstractmethod
    def has_backprops(self, names: Iterable[str]) -> bool:
        """Tell whether any of these parameters has received a backprop that was not discarded."""

    def recomputed(self) -> set[str]:
        """Return the names of parameters whose values are read after the backward, when gradients are pulled back."""
        return set()

    @property
    def padding_rows(self) -> dict[str, int]:
        """Rows of parameters, by name, that stand for padding in all uses that were learned: the gradient of no sample
        has any other value than zero there.
        """
        return {}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the private parameters in the forward."""
        return {parameter.dtype for parameter in self._parameters.values()}

    def constants(self) -> list[tuple[Hashable, Tensor]]:
        """Return the tensors without samples that functions of parameters meet in this microbatch, each with a key of
        the operation. Their values may be data: of a penalty's weight, say, or of a row's number.
        """
        return []

    @property
    def follower(self) -> Follower | None:
        """The mode that follows the owners of rows through this microbatch; None if their positions tell these."""
        return None

    def prefer_owners(self) -> bool:
        """Follow the owners of rows when the layout is learned again; return False if that is not possible or new."""
        return False

    def differentiate_twice(self) -> bool:
        """Record uses in backwards that create a graph, when the layout is learned again; return False if that is not
        possible or new.
        """
        return False

    def replay_functions(self) -> bool:
        """Run each ``torch.autograd.Function`` that hides uses again for each sample when the layout is learned again;
        return False if that is not possible or new.
        """
        return False

    def spread_penalties(self) -> bool:
        """Spread penalties on parameters, which are added to a mean loss, evenly over the samples when the layout is
        learned again; return False if that is not possible or new.
        """
        return False

    @abstractmethod
    def accept_grads(self, names: Iterable[str]) -> None:
        """Accept that these parameters hold a ``.grad`` within a microbatch, because it is the privatized gradient."""

    @abstractmethod
    def check_tracked(self) -> None:
        """Check, after a backward, that every use of a private parameter was recorded.

        Raises:
            PrivacyError: a private parameter got a ``.grad`` of its own (it is reset first), or the input of a
                recorded call was modified in place.
        """

    @abstractmethod
    def end(self) -> None:
        """Free the microbatch's data; until the next :meth:`begin` the module trains as if there were no engine."""
