"""Trial: what is learned and checked by running the user's step on a few records, in the sandbox.

The batch axis of every layer, whether samples are independent, and whether an optimizer's steps depend on the samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample.frozen_randomness import FrozenRandomness
from lightning_dp.per_sample.independence import compare_with_singles
from lightning_dp.step.randomness import seed_generators
from lightning_dp.step.sandbox import Sandbox
from lightning_dp.step.step import PrivateStep

#: Sizes at which the layout is learned; both are made of the same two samples, so that padded lengths agree.
LAYOUT_SIZES = (2, 3)
#: The independence check compares several batches of three, each under another seed of numpy and Python.
NUM_CHECKS, NUM_CHECKED = 3, 9
#: Relative tolerance of the independence check, by the narrowest type that takes part.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Host(Protocol):
    """The adapter that runs the user's step."""

    def records(self, num: int) -> list[Any]:
        """Return a few records of the training set, always the same."""

    def run(self, records: list[Any]) -> Any:
        """Collate records and run the user's step on them; return what it returned."""

    def loss_of(self, output: Any, count: int) -> Tensor | None:
        """Return the loss of an output as a scalar, if the host back-propagates it."""

    @property
    def narrow(self) -> torch.dtype:
        """Narrowest type in which the step computes."""


class Probe:
    """Takes the gradients of a run in the sandbox where a real run would step its optimizers.

    Args:
        step: the private step.
        engine: whether the per-sample engine records; else gradients of the whole batch are taken.
    """

    def __init__(self, step: PrivateStep, *, engine: bool) -> None:
        self._step, self._engine = step, engine
        self.private: dict[str, Tensor] = {}
        self.public: dict[str, Tensor] = {}
        self.stepped: set[int] = set()
        self._raw: dict[str, Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Take raw gradients away in the moment autograd has made them: no line of user code sees one."""
        public = {name for index in self._step.settings.public_optimizers for name in self._step.parameters_of(index)}
        handles = [
            parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]
            for name, parameter in self._step.module.named_parameters()
            if parameter.requires_grad and name not in public and not self._engine
        ]
        self._step.probe = self
        try:
            yield
        finally:
            self._step.probe = None
            for handle in handles:
                handle.remove()

    def _taker(self, name: str) -> Any:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
                self._raw[name] = self._raw[name] + gradient if name in self._raw else gradient

        return take

    def collect(self, optimizer: int) -> None:
        """Take the gradients of an optimizer where a real run would step it."""
        step = self._step
        self.stepped.add(optimizer)
        names = list(step.parameters_of(optimizer))
        if optimizer in step.settings.public_optimizers:
            own = step.parameters_of(optimizer)
            self.public |= {n: p.grad.detach().clone() for n, p in own.items() if p.grad is not None}
        elif self._engine:
            self.private |= step.engine.per_sample_gradients(names)
        else:
            self.private |= {name: self._raw[name] for name in names if name in self._raw}

    def discard(self, optimizer: int) -> None:
        """Forget gradients, as ``zero_grad`` does."""
        names = list(self._step.parameters_of(optimizer))
        if self._engine:
            self._step.engine.discard(names)
        for name in names:
            self._raw.pop(name, None)


class Trial:
    """Runs the user's step on a few records, without effect, and judges what it sees.

    Args:
        step: the private step.
        host: runs the user's code.
        sandbox: keeps it without effect.
    """

    def __init__(self, step: PrivateStep, host: Host, sandbox: Sandbox) -> None:
        self._step, self._host, self._sandbox = step, host, sandbox

    @property
    def _module(self) -> nn.Module:
        return self._step.module

    def prepare(self) -> None:
        """Learn the layout, and check on records from all over the training set that samples are independent.

        Raises:
            PrivacyError: a sample's gradient depends on another sample, or saved state on the samples.
        """
        settings, step = self._step.settings, self._step
        records = self._host.records(NUM_CHECKED)
        if not settings.runs_samples_alone:
            pair = (records * 2)[:2]
            with self._sandbox.enter():
                seed_generators(0)
                with FrozenRandomness():
                    step.engine.learn_layout(
                        lambda size: self._run((pair * size)[:size], engine=False), sizes=LAYOUT_SIZES
                    )
            if settings.check_per_sample:
                for number in range(NUM_CHECKS):
                    chosen = records[number::NUM_CHECKS]
                    if number % 2:
                        chosen.reverse()  # an order that the data came in, by length say, must not matter
                    if chosen:
                        self._check_independence(chosen, seed=number)
        if settings.check_per_sample and len(records) > 1:
            step.unchecked_public = set(settings.public_optimizers)

    def _run(self, records: list[Any], *, engine: bool) -> Probe:
        """Run the step on records within a sandbox that is entered already."""
        step, probe = self._step, Probe(self._step, engine=engine)
        with probe.attached(), step.microbatch(len(records)) if engine else _nothing():
            output = self._host.run(records)
            if step.automatic:
                loss = self._host.loss_of(output, len(records))
                if loss is not None and loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
                if engine:
                    step.engine.check_tracked()
                probe.collect(0)
        return probe

    def _try(self, records: list[Any], *, engine: bool, seed: int, by_place: bool = False) -> Probe:
        """Run the step on records in a sandbox, with randomness held still."""
        with self._sandbox.enter():
            seed_generators(seed)
            with FrozenRandomness(by_place=by_place):
                return self._run(records, engine=engine)

    def _check_independence(self, records: list[Any], *, seed: int) -> None:
        scale = len(records) if self._step.settings.loss_reduction == "mean" else 1
        batched = self._try(records, engine=True, seed=seed)

        def alone() -> Iterator[dict[str, Tensor]]:
            buffers: list[dict[str, Tensor]] = []
            for record in records:
                with self._sandbox.enter():
                    seed_generators(seed)
                    with FrozenRandomness():
                        probe = self._run([record], engine=False)
                    buffers.append({name: value.detach().clone() for name, value in _saved_buffers(self._module)})
                _check_buffers(buffers)
                del buffers[1:]
                yield probe.private
                del probe  # before the next gradients are made

        dtypes = {gradient.dtype for gradient in batched.private.values()}
        tolerance = TOLERANCE[torch.float64 if dtypes == {torch.float64} else self._host.narrow]
        compare_with_singles(batched.private, alone(), scale=scale, rtol=tolerance, module=self._module)

    def check_public(self) -> None:
        """Check that a public optimizer's gradient changes neither with the batch nor with how many samples it holds.

        Optimizers that did not step on this trial stay unchecked; their first real step is refused until one has.

        Raises:
            PrivacyError: the gradient changes.
        """
        records = self._host.records(3)
        found: list[Probe] = []
        for chosen in (records[:1], records[1:2], records):
            parts = chosen * 2 if len(chosen) == 1 else chosen
            found.append(self._try(parts, engine=False, seed=0, by_place=True))
        positions = self._step.settings.public_optimizers
        for other, what in (
            (found[1], "which samples are in the batch"),
            (found[2], "how many samples the batch holds"),
        ):
            for name, gradient in found[0].public.items():
                bound = 1e-5 * (1e-8 + float(gradient.abs().max()))
                if name not in other.public or float((gradient - other.public[name]).abs().max()) > bound:
                    raise PrivacyError(
                        f"Expected the gradients of public_optimizers={positions!r} to be free of the data, got one for {name!r} "
                        f"that changes with {what}. Leave the optimizer out of public_optimizers, or keep data and batch size "
                        "out of its loss (a generator draws a fixed number of fakes for its own step)."
                    )
        self._step.unchecked_public -= found[0].stepped

    def check_skip(self) -> None:
        """Check, where ``training_step`` gave no loss for a batch, that it gives none for single samples either.

        Raises:
            PrivacyError: it does, so whether a sample counts depends on the samples around it.
        """
        for record in self._host.records(3):
            with self._sandbox.enter():
                seed_generators(0)
                if self._host.run([record]) is not None:
                    raise PrivacyError(
                        "Expected training_step to return None for every sample or for none, got None for a batch and a loss for "
                        "one sample alone. One sample could switch off all others: return the loss (a sample that is not finite "
                        "contributes zero anyway), or use microbatch_size=1."
                    )

    def check_steps(self, real: set[int], counts: Any) -> None:
        """Check, where some private optimizer did not step on a batch, that it does not step on single samples either.

        Args:
            real: private optimizers that stepped.
            counts: context manager that gives public counters the values of before the batch.

        Raises:
            PrivacyError: others step there, so whether noise is released depends on the samples.
        """
        private = self._step.accumulators.keys()
        for record in self._host.records(3):
            with self._sandbox.enter(), counts():
                seed_generators(0)
                stepped = self._run([record], engine=False).stepped & private
            if stepped != real:
                raise PrivacyError(
                    f"Expected private optimizers to step whatever the samples are, got steps of {sorted(real)} on a batch and of "
                    f"{sorted(stepped)} on one sample alone. One sample could switch off all others: let batch_idx or a count "
                    "decide when to step (a sample that is not finite contributes zero anyway)."
                )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, value


def _check_buffers(after: list[dict[str, Tensor]]) -> None:
    """Check that what checkpoints hold in addition to parameters does not depend on the samples: nothing noises it."""
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
