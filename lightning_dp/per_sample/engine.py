"""The per-sample engine: one forward, one backward, then norms and weighted sums of per-sample gradients.

Legend: ``G`` groups of parameters, ``B`` samples of the microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.errors import PrivacyError
from lightning_dp.masks.parameter_mask import ParameterMask
from lightning_dp.per_sample._torch import unfollowed, unreported
from lightning_dp.per_sample.base import GradientEngine
from lightning_dp.per_sample.batch_owners import BatchOwners
from lightning_dp.per_sample.functions import pulled_back
from lightning_dp.per_sample.joining import Joining
from lightning_dp.per_sample.layout import WAY_OUT
from lightning_dp.per_sample.nodes import Node, Region, view_of
from lightning_dp.per_sample.plans import Learner
from lightning_dp.per_sample.recurrent import note_order
from lightning_dp.per_sample.sources import Source, add_combined, norm_of, zero_gradient
from lightning_dp.per_sample.tracker import Tracker
from lightning_dp.per_sample.uses import Recorder
from lightning_dp.per_sample.workspace import SHARE, Workspace

GradSample = Literal["auto", "materialize"]
Memory = Literal["fast", "lean"]


class PerSampleEngine(GradientEngine):
    """Norms and weighted sums of the gradients of every sample, from the operations that use them.

    **Guarantee**: between :meth:`begin` and :meth:`end` no private parameter gets a ``.grad``; ``gradient_i`` is the
    gradient of the loss as back-propagated with respect to what sample i's rows contributed, exact for losses that do
    not mix samples (a mean over the microbatch gives ``gradient_i / B``). A sample with factor 0 contributes exactly
    zero, whatever it holds. Everything returned is private. What cannot be had exactly raises ``PrivacyError``.

    Args:
        module: the user's module. Its private parameters change their class between begin and end.
        grad_sample: ``"auto"`` never makes a full per-sample gradient where a cheaper way exists; ``"materialize"``
            always makes it (reference).
        memory: ``"fast"`` keeps per-sample gradients from the norms to the weighted sum where that is fastest, in
            buffers of at most the size of the layers' inputs and outputs, the parameters and their gradients;
            ``"lean"`` caches only what is smaller than the backprops, and the gradients of parameters that are used in
            several ways.

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
            raise ValueError(
                f"Expected grad_sample 'auto' or 'materialize', got grad_sample={grad_sample!r}. Pass one of these."
            )
        if memory not in ("fast", "lean"):
            raise ValueError(f"Expected memory 'fast' or 'lean', got memory={memory!r}. Pass one of these.")
        self._module = module
        self._workspace = Workspace(self._most_kept) if memory == "fast" else None
        self._recorder = Recorder()
        self._tracker = Tracker(self._recorder, materialise=grad_sample == "materialize", workspace=self._workspace)
        self._attached = False
        self._parameters: dict[str, nn.Parameter] = {}
        self._num_bytes: int | None = None  # of parameters and their gradients
        self._had_grad: set[str] = set()
        self._untracked: set[str] = set()
        self._guards: list[Any] = []
        self._known_disjoint: dict[Hashable, bool] = {}
        self._whole: dict[str, Tensor] = {}  # gradients of parameters that are used in several ways
        self._whole_at = -1
        self._batch_owners = BatchOwners(module)
        self._learning_size: int | None = None
        self._follows_owners = False

    @override
    def attach(self) -> None:
        self._attached = True
        if not self._guards:
            self._guards = [
                parameter.register_post_accumulate_grad_hook(self._guard(name))  # type: ignore[no-untyped-call]
                for name, parameter in self._parameters.items()
                if parameter.requires_grad
            ] + [
                module.register_forward_pre_hook(note_order, prepend=True, with_kwargs=True)
                for module in self._module.modules()
                if isinstance(module, nn.RNNBase)
            ]

    def _guard(self, name: str) -> Callable[[Tensor], None]:
        """Return a hook that immediately removes a gradient that no recorded use has seen."""

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
        if self._parameters.keys() == parameters.keys() and all(
            self._parameters[name] is parameter for name, parameter in parameters.items()
        ):
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
        if self._follows_owners:
            return True
        learned = self._tracker.learned
        return learned is not None and self._parameters.keys() <= learned.names

    @override
    def learn_layout(
        self,
        run: Callable[[int], object],
        sizes: tuple[int, int] = (2, 5),
        *,
        more: bool = False,
        alike: bool = False,
    ) -> None:
        if not (len(sizes) == 2 and min(sizes) >= 2 and sizes[0] != sizes[1]):
            raise ValueError(f"Expected two different sizes of at least 2, got sizes={tuple(sizes)}.")
        self.end()
        if not more:
            self._follows_owners = False
            self._batch_owners.forget()
        grads = {parameter: parameter.grad for parameter in self._module.parameters()}

        def run_of(size: int) -> None:
            self._learning_size = size
            run(size)

        try:
            with torch.enable_grad():
                if more and self._follows_owners:
                    self._try_owners(run, sizes)
                    return
                learner = Learner(self._tracker, run_of, (sizes[0], sizes[1]))
                try:
                    learned = learner.learn(set(self._parameters))
                except PrivacyError as error:
                    if more:  # the result of these runs is unclear: such uses are refused later
                        return
                    self._learning_size, self._tracker.learned = None, None
                    try:
                        self._try_owners(run, sizes)
                    except PrivacyError as second:
                        raise PrivacyError(f"{error} Nor can rows be followed to their samples: {second}") from error
                else:
                    before = self._tracker.learned
                    self._tracker.learned = before.joined(learned) if more and before is not None else learned
                    self._settle_rows(run, sizes, alike=alike)
        finally:
            self._learning_size = None
            for parameter, grad in grads.items():
                parameter.grad = grad

    def _try_owners(self, run: Callable[[int], object], sizes: tuple[int, int]) -> None:
        """Run the user's forward and follow the owners of rows, because positions do not determine them."""
        self._follows_owners = True
        try:
            for size in sizes:
                self.begin(size)
                run(size)
                self.end()
        except (PrivacyError, RecursionError) as error:
            # RecursionError: both ways of following make an operation call itself
            self._follows_owners = False
            self.end()
            if isinstance(error, PrivacyError):
                raise
            raise PrivacyError(
                "Expected operations whose rows can be followed to their samples, got one without end."
            ) from error

    def _settle_rows(self, run: Callable[[int], object], sizes: tuple[int, int], *, alike: bool) -> None:
        """Check that each sample has K rows, if several rows per sample are folded into the batch axis."""
        learned = self._tracker.learned
        assert learned is not None
        if not learned.has_folds or not self._batch_owners.was_seen:
            return
        self._learning_size, self._tracker.num_misplaced = None, 0
        try:
            self._try_owners(run, sizes)
        except PrivacyError:
            if alike:  # owners cannot be followed, and such records do not show whether K is common: keep it fixed
                learned.pin()
            return
        self._follows_owners = self._tracker.num_misplaced > 0 or self._batch_owners.has_indices

    @property
    def follows_owners(self) -> bool:
        """True if rows belong to samples by an index that is followed through the step, not by position."""
        return self._follows_owners

    @override
    def see(self, batch: Any) -> None:
        if self._learning_size is not None:
            self._batch_owners.learn(batch, self._learning_size)
        elif self._tracker.follower is not None:
            self._batch_owners.note(batch, self._tracker.follower)

    @property
    def listening(self) -> bool:
        """True if backwards count."""
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
        self.end()
        self._had_grad = {name for name, parameter in self._parameters.items() if parameter.grad is not None}
        self._recorder.begin(batch_size, None if owners is None else Joining(owners))
        self._tracker.start()
        if self._follows_owners:
            self._tracker.follow(batch_size, [*self._module.buffers()])

    @override
    def discard(self, names: Iterable[str] | None = None) -> None:
        self._recorder.changes += 1
        self._whole = {}
        chosen = frozenset(self._parameters if names is None else names)
        for source in self._tracker.sources.values():
            gone = set()
            for key, node in source.nodes.items():
                if chosen.issuperset(node.names):
                    gone.add(key)
                elif not chosen.isdisjoint(node.names) and key in source.live():
                    raise PrivacyError(
                        f"Expected the parameters of {node.name!r} in one optimizer, got some in another. Their "
                        "gradients come from one computation; train them together."
                    )
            source.discard(frozenset(gone))

    @override
    def has_backprops(self, names: Iterable[str]) -> bool:
        return not self._parts(set(names)).keys().isdisjoint(names)

    @override
    def recomputed(self) -> set[str]:
        live = [source.nodes[key] for source in self._tracker.sources.values() for key in source.live()]
        return {name for node in live if not node.is_view for name in node.names}

    @override
    def accept_grads(self, names: Iterable[str]) -> None:
        self._had_grad |= set(names)

    @override
    def check_tracked(self) -> None:
        with unreported():
            set_since = {name for name, p in self._parameters.items() if p.grad is not None} - self._had_grad
        untracked = sorted(self._untracked | self._tracker.untracked | set_since)
        self._untracked, self._tracker.untracked = set(), set()
        if untracked:
            for name in untracked:
                self._parameters[name].grad = None
            raise PrivacyError(
                "Expected private parameters to be used in operations that report themselves, got a gradient of "
                f"another use for {untracked}: a torch.autograd.Function, a scripted or compiled function, an "
                f"extension. {WAY_OUT}."
            )
        for source in self._tracker.sources.values():
            for use in source.uses:
                use.check_unchanged()

    @override
    def end(self) -> None:
        self._tracker.stop()
        self._recorder.end()
        self._whole = {}
        self._untracked = set()

    @override
    def squared_norms(
        self, groups: Sequence[Sequence[str]], masks: Mapping[str, ParameterMask] | None = None
    ) -> Tensor:
        masks = masks or {}
        with self._arithmetic():
            asked = {name for group in groups for name in group}
            norms: dict[str, Tensor] = {}
            views, whole = self._sorted(asked, masks)
            for source, keys in views.items():
                mine = {key: masks[name] for key, (name, _) in keys.items() if name in masks}
                for key, norm in source.squared_norms(set(keys), mine).items():
                    name, _ = keys[key]
                    norms[name] = norms[name] + norm if name in norms else norm
            for name, grad in self._gathered(whole).items():
                norms[name] = norm_of(grad, masks.get(name))
            sums = self._new_norms(len(groups), self._recorder.num_samples)
            for row, group in zip(sums, groups, strict=True):
                for name in group:
                    if name in norms:
                        row += norms[name]
            return sums

    @override
    def accumulate(
        self,
        factors: Tensor,
        groups: Sequence[Sequence[str]],
        out: Mapping[str, Tensor],
        masks: Mapping[str, ParameterMask] | None = None,
        scratch: Mapping[str, Tensor] | None = None,
    ) -> None:
        masks = masks or {}

        def target(name: str, *, direct: bool = True) -> Tensor:
            """Return the tensor that receives the weighted sum of a whole parameter."""
            if name not in masks and direct:
                return out[name]
            if scratch:
                return scratch[name].zero_()
            return torch.zeros_like(self._parameters[name], dtype=out[name].dtype)

        def take(name: str, total: Tensor) -> None:
            if total is not out[name]:
                out[name].add_(masks[name].select(total) if name in masks else total)

        with self._arithmetic():
            dead = factors == 0
            any_dead = bool(dead.any())
            for row, group in enumerate(groups):
                lost = dead[row] if any_dead else None
                views, whole = self._sorted(set(group), masks)
                for source, keys in views.items():
                    masked = {key: name for key, (name, _) in keys.items() if name in masks}
                    rows = {key: out[name] for key, name in masked.items()}
                    mine = {key: masks[name] for key, name in masked.items()}
                    rest = keys.keys() - source.add_active_entries(rows, mine, factors[row], lost)
                    sums: dict[str, Tensor] = {}
                    for name, region in map(keys.__getitem__, rest):
                        if name not in sums:
                            sums[name] = target(name, direct=region is None or out[name].is_contiguous())
                    targets = {key: view_of(sums[keys[key][0]], keys[key][1]) for key in rest}
                    source.add_weighted_sum(targets, factors[row], lost)
                    for name, total in sums.items():
                        take(name, total)
                for name, grad in self._gathered(whole).items():
                    total = target(name)
                    add_combined(total, grad, factors[row], lost)
                    take(name, total)

    @override
    def per_sample_gradients(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        asked = list(self._parameters if names is None else names)
        with self._arithmetic():
            # cached gradients may be in a buffer that the next microbatch overwrites
            grads = {name: grad.clone() for name, grad in self._computed(set(asked)).items()}
            size = self._recorder.num_samples
            return {
                name: grads[name] if name in grads else zero_gradient(self._parameters[name], size) for name in asked
            }

    def _parts(self, names: set[str]) -> dict[str, list[tuple[Source, Node]]]:
        """Return, by parameter, its derived tensors that received backprops, with their sources."""
        parts: dict[str, list[tuple[Source, Node]]] = {}
        for source in self._tracker.sources.values():
            for key in source.live():
                node = source.nodes[key]
                for name in node.names:
                    if name in names:
                        parts.setdefault(name, []).append((source, node))
        return parts

    def _sorted(
        self, names: set[str], masks: Mapping[str, ParameterMask]
    ) -> tuple[dict[Source, dict[Hashable, tuple[str, Region | None]]], set[str]]:
        """Return the sources of disjoint views of parameters, and the parameters whose whole gradient is needed.

        A parameter that is seen through views needs all of it under a mask: the masked norm and the masked sum of a
        view come from different products, whose rounding no norm covers.
        """
        views: dict[Source, dict[Hashable, tuple[str, Region | None]]] = {}
        whole: set[str] = set()
        for name, parts in self._parts(names).items():
            through_views = name in masks and any(node.region is not None for _, node in parts)
            if (
                through_views
                or not all(node.is_view for _, node in parts)
                or not self._disjoint(name, [node for _, node in parts])
            ):
                whole.add(name)
                continue
            for source, node in parts:
                views.setdefault(source, {})[node.key] = (name, node.region)
        return views, whole

    def _disjoint(self, name: str, nodes: Sequence[Node]) -> bool:
        if len(nodes) == 1:
            return True
        key = (name, *(node.region for node in nodes))
        if key not in self._known_disjoint:
            counts = torch.zeros(self._parameters[name].shape, dtype=torch.int32)
            for node in nodes:
                view_of(counts, node.region).add_(1)
            self._known_disjoint[key] = bool((counts <= 1).all())
        return self._known_disjoint[key]

    def _gathered(self, names: set[str]) -> dict[str, Tensor]:
        """Return per-sample gradients with all contributions added, because cross terms count."""
        if self._whole_at != self._recorder.changes:
            self._whole, self._whole_at = {}, self._recorder.changes
        # norms and weighted sum are taken from the same tensor: nothing is lost where parts cancel
        if missing := names - self._whole.keys():
            self._whole.update(self._computed(missing))
        return {name: self._whole[name] for name in names & self._whole.keys()}

    def _computed(self, names: set[str]) -> dict[str, Tensor]:
        parts = self._parts(names)
        total: dict[str, Tensor] = {}
        pulled: dict[Node, dict[str, Tensor]] = {}
        for name, mine in parts.items():
            added: Tensor | None = None
            for source, node in mine:
                if node.key == name:
                    grad = source.cached({name})[name]
                elif node.is_view:
                    part = source.cached({node.key})[node.key]
                    grad = part.new_zeros(len(part), *self._parameters[name].shape)
                    assert node.region is not None
                    offset, shape, strides = node.region
                    grad.as_strided((len(part), *shape), (grad[:1].numel(), *strides), offset).copy_(part)
                else:
                    if node not in pulled:
                        pulled[node] = pulled_back(self._tracker, node, source.cached({node})[node])
                    if name not in pulled[node]:
                        continue
                    grad = pulled[node][name]
                added = grad if added is None else added + grad
            if added is not None:
                total[name] = added
        return total

    def _most_kept(self) -> float:
        """Return the largest total size of cached gradients, in bytes: a share of the memory in use."""
        if self._num_bytes is None:
            parameters = sum(parameter.nbytes for parameter in self._module.parameters())
            self._num_bytes = parameters + sum(parameter.nbytes for parameter in self._parameters.values())
        return SHARE * (self._recorder.num_bytes + self._num_bytes)

    @override
    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with unfollowed(), super()._arithmetic():
            yield
