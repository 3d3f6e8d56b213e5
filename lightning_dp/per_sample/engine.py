"""The per-sample engine: one forward, one backward, then norms and weighted sums of per-sample gradients.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.assign import Places, assign
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.learning import Learned, Learner
from lightning_dp.per_sample.precision import exact_arithmetic
from lightning_dp.per_sample.recorder import Recorder
from lightning_dp.per_sample.units import Grads, Source, add_combined, norm_of, zero_gradient
from lightning_dp.per_sample.workspace import SHARE, Workspace

GradSample = Literal["auto", "materialize"]
Memory = Literal["fast", "lean"]


class PerSampleEngine:
    """Norms and weighted sums of the gradients of every sample, from module hooks.

    **Guarantee**: between :meth:`begin` and :meth:`end` no private parameter gets a ``.grad``; ``gradient_i`` is the
    gradient of the loss as back-propagated with respect to what sample i's rows contributed, exact for losses that do
    not mix samples (a mean over the microbatch gives ``gradient_i / B``). A sample with factor 0 contributes exactly
    zero, whatever it holds. Everything returned is private. What cannot be had exactly raises ``PrivacyError``.

    Args:
        module: the user's module; nothing of it is changed but hooks, between attach and detach.
        grad_sample: ``"auto"`` never makes a full per-sample gradient where a cheaper way exists; ``"materialize"``
            always makes it (reference).
        memory: ``"fast"`` keeps per-sample gradients from the norms to the weighted sum where that is fastest, in
            buffers of at most the size of the layers' inputs and outputs, the parameters and their gradients;
            ``"lean"`` caches only what is smaller than the backprops, and the gradients of modules without a rule.

    Example:
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
            raise ValueError(f"Expected grad_sample 'auto' or 'materialize', got grad_sample={grad_sample!r}.")
        if memory not in ("fast", "lean"):
            raise ValueError(f"Expected memory 'fast' or 'lean', got memory={memory!r}.")
        self._module = module
        self._materialise = grad_sample == "materialize"
        self._workspace = Workspace(self._most_kept) if memory == "fast" else None
        self._recorder = Recorder()
        self._attached = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._places = Places(module, {})
        self._learned: Learned | None = None
        self._units: list[Source] = []
        self._had_grad: set[str] = set()
        self._untracked: set[str] = set()
        self._guards: list[Any] = []
        self._totals: Grads = {}
        self._totals_at = -1

    def attach(self) -> None:
        """Register the hooks; a second call changes nothing."""
        self._attached = True
        for unit in self._units:
            unit.attach()
        if not self._guards:
            self._guards = [
                parameter.register_post_accumulate_grad_hook(self._guard(name))  # type: ignore[no-untyped-call]
                for name, parameter in self._parameters.items()
                if parameter.requires_grad
            ]

    def _guard(self, name: str) -> Callable[[Tensor], None]:
        """Return a hook that takes away, at once, a gradient which no record has seen."""

        def take(parameter: Tensor) -> None:
            if self._recorder.active and self._recorder.listening:
                parameter.grad = None
                self._untracked.add(name)

        return take

    def _remove_guards(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def detach(self) -> None:
        """Remove every hook; a second call changes nothing."""
        self.end()
        if self._workspace is not None:
            self._workspace.clear()
        self._attached = False
        for unit in self._units:
            unit.detach()
        self._remove_guards()

    def set_parameters(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Say which parameters are private: qualified name (the first of ``named_parameters``) to parameter.

        Raises:
            PrivacyError: a parameter belongs to a module whose per-sample gradient cannot be known.
        """
        if self._parameters.keys() == parameters.keys() and all(
            self._parameters[name] is parameter for name, parameter in parameters.items()
        ):
            return
        self._parameters = dict(parameters)
        self._places = Places(self._module, self._parameters)
        self._remove_guards()
        self._build()

    @property
    def has_layout(self) -> bool:
        """Whether the layout of every module that owns a private parameter is known."""
        return self._learned is not None and self._places.tried <= self._learned.tried

    def learn_layout(self, run: Callable[[int], None], sizes: tuple[int, int] = (2, 5)) -> None:
        """Learn which axis of every call runs over the samples, from runs at two sizes.

        Args:
            run: executes the user's forward on that many samples. The smaller batch must be the beginning of the
                larger one, padded alike, with random layers off; a backward is allowed. It is called two to about
                ten times.
            sizes: two different sizes, at least 2.

        Raises:
            PrivacyError: the samples of a module that owns private parameters cannot be told apart.
        """
        if not (len(sizes) == 2 and min(sizes) >= 2 and sizes[0] != sizes[1]):
            raise ValueError(f"Expected two different sizes of at least 2, got sizes={tuple(sizes)}.")
        self.end()
        grads = {parameter: parameter.grad for parameter in self._module.parameters()}
        try:
            with torch.enable_grad():
                learner = Learner(self._module, run, (sizes[0], sizes[1]))
                self._learned = learner.learn(self._places.bare(), self._places.layers())
            self._learned.tried = set(self._places.tried)
        finally:
            for parameter, grad in grads.items():
                parameter.grad = grad
        self._build()

    def _build(self) -> None:
        for unit in self._units:
            unit.detach()
        self._units = []
        if not self.has_layout:
            return
        assert self._learned is not None
        self._units = assign(
            self._recorder, self._places, self._learned, workspace=self._workspace, materialise=self._materialise
        )
        if self._attached:
            self.attach()

    @property
    def listening(self) -> bool:
        """Whether backwards count; switch off around a backward that is not the loss's (adversarial examples)."""
        return self._recorder.listening

    @listening.setter
    def listening(self, value: bool) -> None:
        self._recorder.listening = value

    def begin(self, batch_size: int) -> None:
        """Start a microbatch of that many samples: forget the last one, record from here on."""
        if not batch_size >= 0:
            raise ValueError(f"Expected batch_size >= 0, got batch_size={batch_size}.")
        if self._parameters and not self.has_layout:
            raise PrivacyError(
                "Expected learn_layout before begin, got parameters whose modules were not seen. Run learn_layout "
                f"again after layers were unfrozen, or {WAY_OUT}."
            )
        self.end()
        self._recorder.begin(batch_size)
        self._had_grad = {name for name, parameter in self._parameters.items() if parameter.grad is not None}

    def discard(self, names: Iterable[str] | None = None) -> None:
        """Forget the backprops received so far for these parameters (None: all), as ``zero_grad`` does."""
        self._recorder.changes += 1
        self._totals = {}
        chosen = frozenset(self._parameters if names is None else names)
        for unit in self._units:
            unit.discard(chosen)

    def has_backprops(self, names: Iterable[str]) -> bool:
        """Tell whether a backprop is waiting for any of these parameters."""
        chosen = set(names)
        return any(not chosen.isdisjoint(unit.live()) for unit in self._units)

    def accept_grads(self, names: Iterable[str]) -> None:
        """Take note that these parameters were given a ``.grad`` on purpose, within a microbatch: the private one."""
        self._had_grad |= set(names)

    def check_tracked(self) -> None:
        """Check, after a backward, that every use of a private parameter was recorded.

        Raises:
            PrivacyError: a private parameter got a ``.grad`` of its own (it is reset first), or the input of a
                recorded call was modified in place.
        """
        set_since = {name for name, p in self._parameters.items() if p.grad is not None} - self._had_grad
        untracked = sorted(self._untracked | set_since)
        self._untracked = set()
        if untracked:
            for name in untracked:
                self._parameters[name].grad = None
            raise PrivacyError(
                f"Expected private parameters to be used in calls of their modules only, got a gradient of another "
                f"use for {untracked}. A penalty on weights belongs into the optimizer's weight_decay; a parameter "
                f"used functionally into a module that is called; {WAY_OUT}."
            )
        for unit in self._units:
            for record in unit.records:
                record.check_unchanged()

    def end(self) -> None:
        """Free everything; until the next :meth:`begin` the module trains as if there were no engine."""
        self._recorder.active = False
        self._recorder.generation += 1
        self._recorder.changes += 1
        self._totals = {}
        self._untracked = set()
        for unit in self._units:
            unit.clear()

    def squared_norms(self, groups: Sequence[Sequence[str]], mask: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the squared norm of every sample's gradient over each group of parameters.

        Args:
            groups: names of the parameters of each group.
            mask: parameter name to a boolean tensor of its shape, True where the gradient is kept; parameters that
                are not named are kept whole.

        Returns:
            Shape ``(G, B)``, float32 (float64 if a private parameter is). Not finite where a gradient is not. Private. Where
            :meth:`accumulate` takes another way to the gradient, the rounding between the two ways is in the norm: what a
            sample adds is never longer than its factor times its norm, to 1e-5, also where the parts of its gradient cancel.
        """
        masks = boolean_masks(mask)
        with self._arithmetic():
            asked = {name for group in groups for name in group}
            norms: Grads = {}
            for unit, names in self._alone(asked):
                norms.update(unit.squared_norms(names, masks))
            for name, grad in self._shared(asked):
                norms[name] = norm_of(grad, masks.get(name))
            zeros = self._zeros()
            rows = []
            for group in groups:
                mine = [norms[name].to(zeros.dtype) for name in group if name in norms]
                rows.append(torch.stack(mine).sum(0) if mine else zeros)
            return torch.stack(rows) if rows else zeros.new_zeros(0, zeros.shape[0])

    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        mask: Mapping[str, Tensor] | None = None,
        places: Mapping[str, Tensor] | None = None,
        room: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add ``sum_i factors[g, i] * gradient_i`` to ``out[name]`` for every parameter of every group g.

        Args:
            factors: shape ``(G, B)``, finite. A factor of 0 drops the sample, even a non-finite one.
            groups: names of the parameters of each group.
            out: parameter name to the tensor that is added to, of the parameter's shape.
            mask: as for :meth:`squared_norms`.
            places: parameter name to the ascending positions of what its mask keeps, in the flattened parameter:
                ``out[name]`` then has these entries only, in a row.
            room: parameter name to a tensor of the parameter's shape and of the type of ``out`` that may be written to, for
                sums that a mask is then put on; made anew where there is none.
        """

        def zeros_for(name: str) -> Tensor:
            if room is not None:
                return room[name].zero_()
            return torch.zeros_like(self._parameters[name], dtype=out[name].dtype)

        masks, places = boolean_masks(mask), places or {}
        with self._arithmetic():
            dead = factors == 0
            any_dead = bool(dead.any())
            for row, group in enumerate(groups):
                lost = dead[row] if any_dead else None
                asked = set(group)
                for unit, names in self._alone(asked):
                    few = {name: out[name] for name in names & places.keys()}
                    rest = names - unit.add_live_entries(few, masks, factors[row], lost) if few else names
                    sums = {name: zeros_for(name) if name in masks else out[name] for name in rest}
                    unit.add_weighted_sum(sums, factors[row], lost)
                    for name in rest & masks.keys():
                        add_masked(out[name], sums[name], masks[name], places.get(name))
                for name, grad in self._shared(asked):
                    total = zeros_for(name) if name in masks else out[name]
                    add_combined(total, grad, factors[row], lost)
                    if name in masks:
                        add_masked(out[name], total, masks[name], places.get(name))

    def per_sample_gradients(
        self, names: Iterable[str] | None = None, mask: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the gradient of every sample, shape ``(B, *shape)`` a parameter; zeros where no backprop came."""
        masks = boolean_masks(mask)
        asked = list(self._parameters if names is None else names)
        with self._arithmetic():
            grads: Grads = {}
            for unit, mine in self._alone(set(asked)):
                held = mine & unit.memory().keys()
                made = unit.kept(mine)
                # what is held may lie in a buffer that the next microbatch overwrites
                grads.update((name, grad.clone() if name in held else grad) for name, grad in made.items())
            grads.update(self._shared(set(asked)))
            size = self._recorder.batch_size
            return {
                name: (grads[name] * masks[name] if name in masks else grads[name])
                if name in grads
                else zero_gradient(self._parameters[name], size)
                for name in asked
            }

    def _alone(self, names: set[str]) -> Iterator[tuple[Source, set[str]]]:
        """Yield the units with the asked parameters that they alone have backprops for."""
        live = self._live()
        for unit in self._units:
            mine = {name for name in unit.names & names if live.get(name) == [unit]}
            if mine:
                yield unit, mine

    def _shared(self, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters used by several units, gradients added: cross terms count.

        Norms and weighted sum are taken from the same tensor, so nothing is lost where the gradients of the units cancel.
        """
        if self._totals_at != self._recorder.changes:
            self._totals, self._totals_at = {}, self._recorder.changes
        for name, units in self._live().items():
            if name in names and len(units) > 1:
                if name not in self._totals:
                    self._totals[name] = reduce(torch.add, [unit.kept({name})[name] for unit in units])
                yield name, self._totals[name]

    def _live(self) -> dict[str, list[Source]]:
        live: dict[str, list[Source]] = {}
        for unit in self._units:
            for name in unit.live():
                live.setdefault(name, []).append(unit)
        return live

    def _most_kept(self) -> float:
        """Return the largest total size of kept gradients, in bytes: a share of what is in memory anyway."""
        parameters = sum(parameter.nbytes for parameter in self._module.parameters())
        gradients = sum(parameter.nbytes for parameter in self._parameters.values())
        return SHARE * (self._recorder.num_bytes + parameters + gradients)

    def _zeros(self) -> Tensor:
        parameters = list(self._parameters.values())
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        device = parameters[0].device if parameters else None
        return torch.zeros(self._recorder.batch_size, dtype=dtype, device=device)

    def _arithmetic(self) -> AbstractContextManager[None]:
        return exact_arithmetic(next((p.device.type for p in self._parameters.values()), "cpu"))


def boolean_masks(mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return masks as booleans: kept or not."""
    if mask is None:
        return {}
    return {name: tensor if tensor.dtype == torch.bool else tensor != 0 for name, tensor in mask.items()}


def add_masked(out: Tensor, total: Tensor, mask: Tensor | None, places: Tensor | None = None) -> None:
    """Add a sum, or what its mask keeps of it; with ``places`` that alone, in a row."""
    if places is not None:
        out.add_(total.reshape(-1)[places])
    else:
        out.add_(total * mask if mask is not None else total)
