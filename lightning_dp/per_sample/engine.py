"""The per-sample engine: one forward, one backward, then norms and weighted sums of per-sample gradients.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.base import GradientEngine
from lightning_dp.per_sample.combining import zero_gradient
from lightning_dp.per_sample.joining import Joining
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.parts import Parts
from lightning_dp.per_sample.tracking.learning import Rows
from lightning_dp.per_sample.tracking.tracker import Tracker
from lightning_dp.per_sample.tracking.untracked import cause_of, hidden_use
from lightning_dp.per_sample.tracking.uses import Recorder
from lightning_dp.per_sample.workspace import SHARE, Workspace
from lightning_dp.system.torch_private import Layers

GradSample = Literal["auto", "materialize"]
Memory = Literal["fast", "lean"]


class PerSampleEngine(GradientEngine):
    """The engine that computes per-sample norms and sums from the operations on private parameters.

    **Guarantee**: between :meth:`begin` and :meth:`end` no private parameter gets a ``.grad``. ``gradient_i`` is the
    part of the back-propagated gradient that comes from the rows of sample i. It is exact for losses that do not mix
    samples (a mean over the microbatch gives ``gradient_i / B``). A sample with factor 0 contributes exactly zero, even
    if its gradient is not finite. Returned norms and gradients are not private: they are computed from the data without
    noise. An operation without exact per-sample gradients raises ``PrivacyError``.

    Args:
        module: the user's module. Its private parameters change their class between begin and end.
        grad_sample: ``"auto"`` materializes a full per-sample gradient only if no cheaper way exists;
            ``"materialize"`` always materializes it (reference).
        memory: ``"fast"`` caches per-sample gradients between the norms and the weighted sum if that is fastest, in
            buffers that together are smaller than the layers' inputs and outputs, the parameters and their gradients;
            ``"lean"`` caches only gradients that are smaller than the backprops, and the gradients of parameters that
            are used in several ways. ``"fast"`` also caches small gradients, of 2^20 numbers together at most.

    Example:
        >>> import torch
        >>> layer = nn.Linear(3, 1)
        >>> engine = PerSampleEngine(layer)
        >>> engine.attach()
        >>> engine.set_parameters(dict(layer.named_parameters()))
        >>> engine.learn_layout(lambda size: layer(torch.ones(2, 3).repeat(3, 1)[:size]))
        >>> engine.begin(2)
        >>> layer(torch.ones(2, 3)).sum().backward()
        >>> engine.squared_norms([["weight", "bias"]])
        tensor([[4., 4.]])
        >>> engine.end()
    """

    def __init__(self, module: nn.Module, *, grad_sample: GradSample = "auto", memory: Memory = "fast") -> None:
        if grad_sample not in ("auto", "materialize"):
            raise ValueError(
                f"Expected grad_sample 'auto' or 'materialize', got grad_sample={grad_sample!r}. Pass one of these."
            )
        if memory not in ("fast", "lean"):
            raise ValueError(f"Expected memory 'fast' or 'lean', got memory={memory!r}. Pass one of these.")
        self._module, self._layers = module, Layers(module)
        self._workspace = Workspace(self._most_kept) if memory == "fast" else None
        self._recorder = Recorder()
        self._tracker = Tracker(self._recorder, materialise=grad_sample == "materialize", workspace=self._workspace)
        self._attached = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._num_bytes: int | None = None  # of parameters and their gradients
        self._had_grad: set[str] = set()
        self._untracked: set[str] = set()
        self._guards: list[Any] = []
        self._parts = Parts(self._tracker, lean=memory == "lean")
        self._rows = Rows(module, self._tracker, self, self._layers)

    @override
    def attach(self) -> None:
        self._attached = True
        if not self._guards:
            self._guards = [
                parameter.register_post_accumulate_grad_hook(self._guard(name))  # type: ignore[no-untyped-call]
                for name, parameter in self._parameters.items()
                if parameter.requires_grad
            ]

    def _guard(self, name: str) -> Callable[[Tensor], None]:
        """Return a hook that removes a raw gradient from ``.grad`` at once and records the parameter as untracked."""

        def take(parameter: Tensor) -> None:
            if self._recorder.active and self._recorder.listening:
                parameter.grad = None
                self._untracked.add(name)

        return take

    @override
    def detach(self) -> None:
        self.end()
        if self._workspace is not None:
            self._workspace.clear()
        self._attached = False
        self._remove_guards()

    def _remove_guards(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    @override
    def set_parameters(self, parameters: Mapping[str, nn.Parameter], gathered: Collection[str] = ()) -> None:
        known = map(self._parameters.get, parameters)
        if len(self._parameters) == len(parameters) and all(map(operator.is_, known, parameters.values())):
            return
        self.end()
        held = {id(parameter) for parameter in self._module.parameters()}
        missing = sorted(name for name, p in parameters.items() if id(p) not in held and name not in gathered)
        if missing:
            raise PrivacyError(
                f"Expected every private parameter to be a parameter of the module, got {missing} outside of it. "
                "Was a layer replaced after the optimizer was made?"
            )
        self._parameters, self._num_bytes = dict(parameters), None
        self._tracker.set_parameters(parameters)
        self._remove_guards()
        if self._attached:
            self.attach()

    @property
    @override
    def has_layout(self) -> bool:
        return self._rows.are_known

    @override
    def learn_layout(
        self, run: Callable[[int], object], sizes: tuple[int, int] = (2, 5), *, more: bool = False, alike: bool = False
    ) -> None:
        if not (len(sizes) == 2 and min(sizes) >= 2 and sizes[0] != sizes[1]):
            raise ValueError(f"Expected two different sizes of at least 2, got sizes={tuple(sizes)}.")
        self.end()
        self._rows.learn(run, (sizes[0], sizes[1]), more=more, alike=alike)

    @property
    def follows_owners(self) -> bool:
        """True if the engine follows the owners of rows through the step instead of using their positions."""
        return self._rows.follows_owners

    @override
    def constants(self) -> list[tuple[Hashable, Tensor]]:
        return self._recorder.constants

    @property
    @override
    def follower(self) -> Follower | None:
        return self._tracker.follower

    @override
    def prefer_owners(self) -> bool:
        return self._rows.prefer_owners()

    @override
    def differentiate_twice(self) -> bool:
        is_new = not self._tracker.differentiates_twice
        self._tracker.differentiates_twice = True
        return is_new

    @override
    def replay_functions(self) -> bool:
        return self._tracker.replays.add_hidden()

    @override
    def spread_penalties(self) -> bool:
        is_new = not self._tracker.spreads_penalties
        self._tracker.spreads_penalties = True
        return is_new

    @override
    def see(self, batch: Any) -> None:
        self._rows.see(batch)

    @property
    def listening(self) -> bool:
        """True if the engine records backprops."""
        return self._recorder.listening

    @listening.setter
    def listening(self, value: bool) -> None:
        self._recorder.listening = value

    @override
    def begin(self, batch_size: int, owners: Tensor | None = None) -> None:
        if not batch_size >= 0:
            raise ValueError(f"Expected batch_size >= 0, got batch_size={batch_size}.")
        if self._parameters and not self.has_layout:
            raise PrivacyError(
                "Expected learn_layout before begin, got parameters whose modules were not seen. Run learn_layout "
                f"again after layers were unfrozen, or {WAY_OUT}."
            )
        if self._recorder.active or self._tracker.is_started:
            self.end()
        self._had_grad = {name for name, parameter in self._parameters.items() if parameter.grad is not None}
        self._recorder.begin(batch_size, None if owners is None else Joining(owners))
        self._tracker.joined = self.joined
        self._tracker.start()
        if self._rows.follows(batch_size, self.joined):
            self._tracker.follow(batch_size, self._layers.now().buffers())

    @override
    def discard(self, names: Iterable[str] | None = None) -> None:
        self._recorder.changes += 1
        self._parts.discard(self._parameters if names is None else names)

    @override
    def has_backprops(self, names: Iterable[str]) -> bool:
        return bool(self._parts.of(set(names)))

    @override
    def recomputed(self) -> set[str]:
        live = [source.nodes[key] for source in self._tracker.sources.values() for key in source.live()]
        return {name for node in live if not node.is_view for name in node.names}

    @override
    def accept_grads(self, names: Iterable[str]) -> None:
        self._had_grad |= set(names)

    @property
    @override
    def padding_rows(self) -> dict[str, int]:
        return self._tracker.padding.found

    @override
    def check_tracked(self) -> None:
        with unfollowed():
            set_since = {name for name, p in self._parameters.items() if p.grad is not None} - self._had_grad
        untracked = sorted(self._untracked | self._tracker.untracked | set_since)
        self._untracked, self._tracker.untracked = set(), set()
        if untracked:
            for name in untracked:
                self._parameters[name].grad = None
            cause = cause_of(untracked, self._tracker.replays.hidden, self._module)
            raise hidden_use(untracked, cause)
        with unfollowed():
            for source in self._tracker.sources.values():
                for use in source.uses:
                    use.check_unchanged()

    @override
    def end(self) -> None:
        self._tracker.stop()
        self._recorder.end()
        self._parts.clear()
        self._untracked = set()

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        with unfollowed(), self._arithmetic():
            sums = self._new_norms(len(groups), self._recorder.num_samples)
            return self._parts.squared_norms(sums, groups, masks or {})

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        with unfollowed(), self._arithmetic():
            self._parts.accumulate(factors, groups, out, masks or {}, scratch or {})

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        asked = list(self._parameters if names is None else names)
        with unfollowed(), self._arithmetic():
            # cached gradients may be in a buffer that the next microbatch overwrites
            grads = {name: grad.clone() for name, grad in self._parts.computed(set(asked)).items()}
            size = self._recorder.num_samples
            return {
                name: grads[name] if name in grads else zero_gradient(self._parameters[name], size) for name in asked
            }

    def _most_kept(self) -> float:
        """Return the most bytes of cached gradients: a share of those of activations, parameters and gradients."""
        if self._num_bytes is None:
            parameters = sum(parameter.nbytes for parameter in self._module.parameters())
            self._num_bytes = parameters + sum(parameter.nbytes for parameter in self._parameters.values())
        return SHARE * (self._recorder.num_bytes + self._num_bytes)
