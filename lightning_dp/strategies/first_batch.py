"""What is learned and checked once, before the first private step: where the batch axis is, and that samples are independent.

Both run the user's ``training_step`` on a few samples with optimizers, logging and progress held still, and put
generators, buffers, metrics and plain attributes back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness, restored_randomness
from lightning_dp.per_sample.independence import compare_with_singles
from lightning_dp.sampling import PrivateDataLoader, collate_samples, peek_samples

if TYPE_CHECKING:
    from lightning_dp.strategies.private_step import PrivateStep

#: Sizes at which the layout is learned; both are made of the same two samples, so that padded lengths agree.
LAYOUT_SIZES = (2, 3)
#: The independence check compares several batches of three, each under another seed of numpy and Python.
NUM_CHECKS, NUM_CHECKED = 3, 9
#: Relative tolerance of the independence check, by the narrowest type that takes part.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}


#: What every module keeps for itself (hooks, parameters, submodules): not the user's state.
MACHINERY = frozenset(nn.Module().__dict__) - {"training"}


class Probe:
    """Stands in for the optimizers while ``training_step`` runs on trial: collects gradients and steps nothing."""

    def __init__(self, strategy: PrivateStep, *, engine: bool) -> None:
        self.strategy = strategy
        self.engine = engine
        self.private: dict[str, Tensor] = {}
        self.public: dict[str, Tensor] = {}
        self.stepped: set[int] = set()

    def collect(self, index: int) -> None:
        """Takes the gradients of optimizer ``index`` where a real run would step it."""
        strategy = self.strategy
        self.stepped.add(index)
        parameters = strategy._parameters_of(index)
        own = strategy._module.automatic_optimization  # else the user's code goes on to work with them
        if index in strategy.settings.public_optimizers:
            self.public |= {n: p.grad.detach().clone() for n, p in parameters.items() if p.grad is not None}
        elif self.engine:
            self.private |= strategy._engine.per_sample_gradients(list(parameters))
        else:
            grads = {n: p.grad.detach() for n, p in parameters.items() if p.grad is not None}
            self.private |= grads if own else {n: grad.clone() for n, grad in grads.items()}


def prepare(strategy: PrivateStep, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Learns the layout and checks, on records from all over the training set, that samples are independent.

    Raises:
        PrivacyError: a sample's gradient depends on another sample, or a saved buffer on the samples.
    """
    loader = strategy._loader
    assert loader is not None
    samples = spread_samples(loader, NUM_CHECKED)
    strategy._stand_in = strategy._stand_in or (samples[:1],)
    if not strategy._runs_samples_alone:
        pair = (samples * 2)[:2]
        with held_still(strategy, seed=0), FrozenRandomness():
            strategy._engine.learn_layout(
                lambda size: try_step(strategy, (pair * size)[:size], rest, kwargs, engine_on=False), sizes=LAYOUT_SIZES
            )
        if strategy.settings.check_per_sample:
            for number in range(NUM_CHECKS):
                chosen = samples[number::NUM_CHECKS]
                if number % 2:
                    chosen.reverse()  # an order that the data came in, by length say, must not matter
                if chosen:
                    _check_independence(strategy, chosen, rest, kwargs, seed=number)
    if strategy.settings.check_per_sample and len(samples) > 1:
        strategy._unchecked_public = set(strategy.settings.public_optimizers)


def try_step(
    strategy: PrivateStep, samples: list[Any], rest: tuple[Any, ...], kwargs: dict[str, Any], *, engine_on: bool
) -> Probe:
    loader = strategy._loader
    assert loader is not None
    batch = strategy._to_device(collate_samples(loader, samples))
    return _run_on_trial(strategy, batch, rest, kwargs, engine_on=engine_on, count=len(samples))


def _check_independence(
    strategy: PrivateStep, samples: list[Any], rest: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int
) -> None:
    module = strategy._module
    scale = len(samples) if strategy.settings.loss_reduction == "mean" else 1
    with held_still(strategy, seed=seed), FrozenRandomness():
        batched = try_step(strategy, samples, rest, kwargs, engine_on=True)

    def alone() -> Iterator[dict[str, Tensor]]:
        buffers: list[dict[str, Tensor]] = []
        for sample in samples:
            with held_still(strategy, seed=seed), FrozenRandomness():
                probe = try_step(strategy, [sample], rest, kwargs, engine_on=False)
                buffers.append({name: value.detach().clone() for name, value in _saved_buffers(module)})
            _check_buffers(buffers)
            del buffers[1:]
            yield probe.private
            del probe  # before the next gradients are made

    dtypes = {gradient.dtype for gradient in batched.private.values()}
    narrow = torch.bfloat16 if "bf16" in str(strategy._trainer.precision) else torch.float32
    tolerance = TOLERANCE[torch.float64 if dtypes == {torch.float64} else narrow]
    compare_with_singles(batched.private, alone(), scale=scale, rtol=tolerance, module=module)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, value


def _check_buffers(after: list[dict[str, Tensor]]) -> None:
    """What checkpoints hold beside parameters must not come to depend on the samples: nothing noises it."""
    for other in after[1:]:
        for name, value in after[0].items():
            if name not in other or value.shape != other[name].shape or not _same(value, other[name]):
                raise PrivacyError(
                    f"Expected buffers to be free of the training data, got {name!r} with another value after another sample. It is "
                    "saved and read by later steps without noise: compute it on public data before fit, or leave it out "
                    "(check_per_sample=False accepts it, outside the guarantee)."
                )


def _same(left: Tensor, right: Tensor) -> bool:
    if not left.is_floating_point():
        return torch.equal(left, right)
    return torch.allclose(left.cpu().double(), right.cpu().double(), rtol=1e-6, atol=0.0, equal_nan=True)


def check_public(strategy: PrivateStep, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A public optimizer's gradient must not change with the batch, nor with how many samples it holds.

    Optimizers that did not step on this trial stay unchecked; their first real step is refused until one has.

    Raises:
        PrivacyError: the gradient changes.
    """
    loader = strategy._loader
    assert loader is not None
    samples = spread_samples(loader, 3)
    found: list[Probe] = []
    for chosen in (samples[:1], samples[1:2], samples):
        with held_still(strategy, seed=0), FrozenRandomness(by_place=True):
            parts = chosen * 2 if len(chosen) == 1 else chosen
            found.append(try_step(strategy, parts, rest, kwargs, engine_on=False))
    for other, what in ((found[1], "which samples are in the batch"), (found[2], "how many samples the batch holds")):
        for name, gradient in found[0].public.items():
            bound = 1e-5 * (1e-8 + float(gradient.abs().max()))
            if name not in other.public or float((gradient - other.public[name]).abs().max()) > bound:
                raise PrivacyError(
                    f"Expected the gradients of public_optimizers={strategy.settings.public_optimizers!r} to be free of the data, "
                    f"got one for {name!r} that changes with {what}. Leave the optimizer out of public_optimizers, or keep data "
                    "and batch size out of its loss (a generator draws a fixed number of fakes for its own step)."
                )
    strategy._unchecked_public -= found[0].stepped


def spread_samples(loader: PrivateDataLoader, num: int) -> list[Any]:
    """Records from all over a dataset with random access, the first ones of a stream; fewer where there are fewer.

    The positions are pseudo-random and always the same: neither sorted nor periodic data makes them alike.
    """
    if isinstance(loader.dataset, IterableDataset):
        return peek_samples(loader, num)
    size = loader.facts.dataset_size or 0
    positions = np.random.default_rng(0).choice(size, size=min(num, size), replace=False)
    return [loader.dataset[int(position)] for position in positions]


def stand_in(strategy: PrivateStep) -> Any:
    """A batch of one record on the device, for steps that must run the user's code although no sample was drawn."""
    loader = strategy._loader
    assert loader is not None
    if strategy._stand_in is None:
        strategy._stand_in = (peek_samples(loader, 1),)
    with restored_randomness():
        return strategy._to_device(collate_samples(loader, strategy._stand_in[0]))


def empty_batch(strategy: PrivateStep) -> Any:
    """What hooks see when no sample was drawn: the user's batch structure with tensors of length 0."""
    return tree_map(lambda leaf: leaf[:0] if isinstance(leaf, Tensor) and leaf.dim() else leaf, stand_in(strategy))


def _run_on_trial(
    strategy: PrivateStep, batch: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], *, engine_on: bool, count: int
) -> Probe:
    probe = Probe(strategy, engine=engine_on)
    strategy._probe = probe
    engine = strategy._engine
    module = strategy._module
    try:
        module.zero_grad(set_to_none=True)
        if engine_on:
            engine.begin(count)
            strategy._recording = True
        output = strategy._call_training_step(batch, rest, kwargs)
        if module.automatic_optimization:
            loss = strategy._scalar_loss(output, count)
            if loss is not None and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            if engine_on:
                engine.check_tracked()
            probe.collect(0)
    finally:
        strategy._end_microbatch()
        strategy._probe = None
        module.zero_grad(set_to_none=True)
    return probe


@contextmanager
def held_still(strategy: PrivateStep, seed: int | None = None) -> Iterator[None]:
    """No logging, no progress, no optimizer or scheduler state; generators and module state as before, afterwards."""
    module = strategy._module
    schedulers = [(config.scheduler, config.scheduler.state_dict()) for config in strategy.lr_scheduler_configs]
    with ExitStack() as stack:
        stack.enter_context(restored_randomness(seed))
        stack.enter_context(_restored_state(module))
        stack.enter_context(silent(module))
        for optimizer in strategy._lightning_optimizers:
            stack.enter_context(without_progress(optimizer))
        try:
            yield
        finally:
            for scheduler, state in schedulers:
                scheduler.load_state_dict(state)


@contextmanager
def silent(module: pl.LightningModule) -> Iterator[None]:
    """``self.log`` and ``self.log_dict`` do nothing."""
    replaced = {"log": _ignore, "log_dict": _ignore}
    before = {name: module.__dict__[name] for name in replaced if name in module.__dict__}
    module.__dict__.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            module.__dict__.pop(name, None)
        module.__dict__.update(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def without_progress(optimizer: Any) -> Iterator[None]:
    """A Lightning optimizer whose steps do not count in ``global_step``."""
    before = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = _ignore
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before


@contextmanager
def _restored_state(module: nn.Module) -> Iterator[None]:
    """Puts back buffers, tensors, lists, dictionaries, sets and plain attributes of every submodule."""
    saved = [(part, _attributes(part), _contents(part)) for part in module.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for part, attributes, contents in saved:
            for name in _attributes(part).keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
            for holder, content in contents:
                _put_back(holder, content)


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in part.__dict__.items() if name not in MACHINERY}


def _contents(part: nn.Module) -> list[tuple[Any, Any]]:
    """Mutable values of a module and copies of what they hold (parameters excepted: nothing steps them here)."""
    kept: list[tuple[Any, Any]] = [(part._buffers, dict(part._buffers))]
    for value in (*_attributes(part).values(), *part._buffers.values()):
        _keep(value, kept, depth=3)
    return kept


def _keep(value: Any, kept: list[tuple[Any, Any]], depth: int) -> None:
    if isinstance(value, Tensor):
        kept.append((value, value.detach().clone()))
    elif isinstance(value, (list, dict, set)):
        kept.append((value, value.copy()))
        for inner in value.values() if isinstance(value, dict) else value:
            if depth:
                _keep(inner, kept, depth - 1)


def _put_back(holder: Any, content: Any) -> None:
    if isinstance(holder, Tensor):
        with torch.no_grad():
            holder.copy_(content)
    elif isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        holder.update(content)
