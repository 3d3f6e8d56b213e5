"""A private step without a Trainer: a small module, a hand-made plan, and noise that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_dp.accounting import make_accountant
from lightning_dp.clipping import Clipping, FlatClipping
from lightning_dp.run_length import RunLength
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState
from lightning_dp.step.step import PrivateStep

NUM_FEATURES, NUM_CLASSES = 4, 3
EXPECTED_BATCH_SIZE, SIGMA = 8, 2.0
STEPS = 2
LENGTH = RunLength(steps=STEPS, steps_per_epoch=1)


def make_settings(**options: Any) -> Settings:
    """Settings with the defaults of ``DPStrategy``, but predictable and without the checks of the first batch."""
    defaults: dict[str, Any] = {
        "noise_multiplier": SIGMA,
        "target_delta": 1e-5,
        "check_per_sample": False,
        "seed": 0,
    }
    return Settings(**{**defaults, **options})


def make_plan(clipping: Clipping, mechanisms: Mechanisms | None = None, **options: Any) -> DPPlan:
    """A plan over ``LENGTH`` with what the mechanisms ask for."""
    asked = mechanisms or Mechanisms()
    asked.begin_run(LENGTH)
    defaults: dict[str, Any] = {
        "sampling": "poisson",
        "dataset_size": 100,
        "expected_batch_size": EXPECTED_BATCH_SIZE,
        "sample_rate": EXPECTED_BATCH_SIZE / 100,
        "steps": LENGTH.steps,
        "steps_per_epoch": LENGTH.steps_per_epoch,
        "noise_multiplier": SIGMA,
        "clipping": clipping,
        "delta": 1e-5,
        "accountant": "pld",
        "schedule": asked.noise_schedule(LENGTH),
        "is_private": asked.is_private(LENGTH),
        "unsound": asked.never_private,
    }
    return DPPlan(**{**defaults, **options})


def make_state(plan: DPPlan | None = None, **options: Any) -> PrivacyState:
    """A fresh state with a plan; weights that other runs have left count for nothing."""
    relation = "add_or_remove_one" if plan is None else plan.neighboring_relation
    state = PrivacyState(relation, make_accountant("pld"), **{"seeded": False, "secure": False, **options})
    state.begin_after([])
    state.plan = make_plan(FlatClipping(1.0)) if plan is None else plan
    return state


class KnownNoise:
    """Stands for ``GaussianNoise``: writes std times a fixed pattern without zeros, and keeps every call."""

    def __init__(self) -> None:
        self.filled: list[tuple[int, float]] = []  # (coordinates, std) of every call
        self.added: list[tuple[int, float]] = []

    def forget(self) -> None:
        self.filled, self.added = [], []

    @staticmethod
    def pattern(num: int) -> Tensor:
        return 1.0 + torch.arange(num) % 5

    def fill_(self, tensor: Tensor, std: float) -> Tensor:
        self.filled.append((tensor.numel(), std))
        return tensor.copy_((self.pattern(tensor.numel()) * std).view_as(tensor))

    def add_(self, tensor: Tensor, std: float) -> Tensor:
        self.added.append((tensor.numel(), std))
        return tensor.add_(self.pattern(tensor.numel()).view_as(tensor), alpha=std)


class Rig:
    """One private step that is set up again for every combination; only its engine, which knows no mechanism, is
    kept.
    """

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.module = nn.Sequential(nn.Linear(NUM_FEATURES, 5), nn.LeakyReLU(), nn.Linear(5, NUM_CLASSES))
        self._weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)
        self.noise = KnownNoise()
        self.step = PrivateStep(
            self.module,
            [self.optimizer],
            settings=make_settings(),
            state=make_state(),
            mechanisms=Mechanisms(),
            reduction=Reduction(),
            noise=self.noise,  # type: ignore[arg-type]
        )
        self.step.streams = SimpleNamespace(begin=lambda: None)  # type: ignore[assignment]  # nothing here draws
        features = torch.randn(8, NUM_FEATURES, generator=torch.Generator().manual_seed(0))
        self.features, self.labels = features, torch.arange(8) % NUM_CLASSES
        self.step.engine.learn_layout(lambda size: self.loss(features[:size], self.labels[:size]))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.module(features), labels)

    @contextmanager
    def under(self, clipping: Clipping, callbacks: Iterable[Any] = (), **plan: Any) -> Any:
        """Begin a run: callbacks hand over what they ask for as under a Trainer, which is yielded for their later
        hooks.
        """
        step, mechanisms = self.step, Mechanisms()
        self.module.load_state_dict(self._weights)
        self.noise.forget()
        private = dict(self.module.named_parameters())
        strategy = SimpleNamespace(mechanisms=mechanisms, steps_taken=0, private_parameters=lambda: private)
        trainer = SimpleNamespace(strategy=strategy, global_step=0, current_epoch=0, optimizers=[self.optimizer])
        callbacks = list(callbacks)
        try:
            for callback in callbacks:
                callback.setup(trainer, self.module, "fit")
            mechanisms.check(clipping, target_epsilon=None, num_private_optimizers=1)
            step.clipping, step.mechanisms = clipping, mechanisms
            step.accumulators.clear()
            step.state = make_state(make_plan(clipping, mechanisms, **plan))
            for callback in callbacks:
                callback.on_train_start(trainer, self.module)
            yield Run(self, trainer, callbacks)
        finally:
            for callback in callbacks:
                callback.teardown(trainer, self.module, "fit")


class Run:
    """Logical steps of one run; every epoch is one step."""

    def __init__(self, rig: Rig, trainer: Any, callbacks: list[L.Callback]) -> None:
        self.step, self._rig, self._trainer, self._callbacks = rig.step, rig, trainer, callbacks

    def begin(self) -> Any:
        """Begin a step; return its release."""
        self._hook(lambda callback: callback.on_train_epoch_start)
        self.step.begin(first_of_pass=True)
        return self.step.releases[0]

    def sum(self, features: Tensor, labels: Tensor, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return gradient and statistics after these samples, or these records of users, instead of those of an earlier
        call.
        """
        accumulator = self.step.accumulators[0]
        accumulator.reset()
        with self.step.microbatch(len(features), owners):
            self._rig.loss(features, labels).backward()
            self.step.backward_done()
            self.step.collect()
        return accumulator.gradient.double() * accumulator.divisor, accumulator.statistics.double()

    def release(self) -> Tensor:
        """Release what the last sum holds, and end the epoch; return all gradients in a row."""
        self.step.release()
        gradient = torch.cat([p.grad.flatten() for p in self._rig.module.parameters()])
        self._hook(lambda callback: callback.on_train_epoch_end)
        self._trainer.current_epoch += 1
        return gradient

    def live(self) -> Tensor:
        """Return which coordinates the masks of the present step keep, asked of the masks themselves."""
        parameters = dict(self._rig.module.named_parameters())
        live = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
        for mask in self.step.mechanisms.masks:
            for name, kept in mask.live(self.step.state.step, parameters).items():
                live[name] &= kept
        return torch.cat([kept.flatten() for kept in live.values()])

    def _hook(self, of: Callable[[Any], Callable[..., Any]]) -> None:
        for callback in self._callbacks:
            of(callback)(self._trainer, self._rig.module)
