"""PrivateLoop: one private run in the user's own loop, and ``make_private``, which makes one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Self, Unpack

from lightning_dp._validate import check_kind
from lightning_dp.loop import saving
from lightning_dp.loop.batches import LogicalBatches
from lightning_dp.loop.facts import LoopFacts, steps_left
from lightning_dp.loop.fit import LoopFit
from lightning_dp.loop.guard import ReleaseGuard
from lightning_dp.loop.host import LossFunction, move_to
from lightning_dp.sampling import private_dataloader
from lightning_dp.sandbox.randomness import kept_generators
from lightning_dp.step import module_checks
from lightning_dp.step.arguments import PrivateArguments, check_length, make_settings, planned_length
from lightning_dp.step.correlation import begin_order
from lightning_dp.step.history import History
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.planning import begin_batch, build_plan
from lightning_dp.step.reduction import Reduction
from lightning_dp.step.settings import Settings
from lightning_dp.step.state import PrivacyState
from lightning_dp.system import ProcessTuning
from lightning_dp.trials.loading import LoadingWatch

#: Models of the runs that are open.
_open: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PrivateLoop]] = weakref.WeakKeyDictionary()


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    loss_fn: LossFunction,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    history: History = None,
    **arguments: Unpack[PrivateArguments],
) -> PrivateLoop:
    """Return a private run over a plain model, optimizer and loader; see ``PrivateLoop``.

    Args:
        model: already on its device; only hooks are added to it, until ``close``.
        optimizer: any torch optimizer over parameters of the model.
        loader: its dataset, collate function, batch size and workers are used; its order is not.
        loss_fn: (model, batch) -> mean loss of shape () or per-sample losses of shape (B,). It runs more often than
            once per step, on other batches too, so it must change nothing outside of the model. A criterion, such
            as ``nn.CrossEntropyLoss()``, is called as loss_fn(model(inputs), targets) on batches (inputs, targets).
        epochs: planned passes over the data; ``target_epsilon`` needs this or ``steps``.
        steps: planned logical steps of the whole run.
        history: privacy spent by earlier runs on the same data, as in ``DPStrategy``.
        **arguments: as for ``DPStrategy``, without ``public_optimizers`` and ``strict_logging``.

    Raises:
        ValueError: arguments out of range, or a model that cannot be trained privately.
        TypeError: arguments of the wrong kind.
        PrivacyError: a layer that mixes samples.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(40, 3))
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = DataLoader(data, batch_size=8)
        >>> def loss_fn(model, batch):
        ...     return model(batch[0]).square().mean()
        >>> budget = {"target_epsilon": 2.0, "target_delta": 1e-3}
        >>> with make_private(model, optimizer, loader, loss_fn, epochs=1, **budget) as private:
        ...     for batch in private.loader:
        ...         private.step(batch)
        >>> private.epsilon() <= 2.0
        True
    """
    settings = make_settings(arguments, owner="make_private")
    check_length(epochs, steps, settings)
    return PrivateLoop(model, optimizer, loader, loss_fn, settings=settings, length=(epochs, steps), history=history)


class PrivateLoop(LoopFacts):
    """One private run in the user's own loop; a context manager. ``make_private`` makes one.

    **Guarantee**: as for ``DPStrategy``. A step on any gradient but the released one is refused, as is a batch that
    another loader drew. NOT covered: ``nonprivate_loss``, and anything else that user code computes from the data.

    Args:
        model: holds the parameters.
        optimizer: optimizer of the model's parameters.
        loader: the user's.
        loss_fn: (model, batch) -> loss.
        settings: the user's arguments.
        length: planned epochs and planned steps, each or None.
        history: privacy spent by earlier runs.
        reduction: communication between processes.
        called: wrapper of the model that ``loss_fn`` gets instead; default: the model.
        move: moves a batch to the device; default: moves all tensors to the model's device.
        around: makes a context in which user code runs.
        others: see ``LoopHost``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        loss_fn: LossFunction,
        *,
        settings: Settings,
        length: tuple[int | None, int | None],
        history: History = None,
        reduction: Reduction | None = None,
        called: nn.Module | None = None,
        move: Callable[[Any], Any] | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        others: Callable[[], list[Any]] = list,
    ) -> None:
        check_kind("model", model, nn.Module, "Pass the network itself.")
        check_kind("optimizer", optimizer, Optimizer, "Pass an optimizer of the model's parameters.")
        check_kind("loss_fn", loss_fn, Callable, "Pass a function of model and batch, or a criterion.")
        module_checks.check_module(model, runs_samples_alone=settings.counts_samples_alone)
        module_checks.check_optimizers([optimizer], model, ())
        running = _open.get(model, lambda: None)()
        if running is not None:
            raise RuntimeError(
                "The model belongs to another private run that is open, whose hooks would record this one too. Call "
                "close() on it, or leave its with block, first."
            )
        self.settings, self.mechanisms = settings, Mechanisms()
        self._model, self._called, self._optimizer, self._loss_fn = model, called or model, optimizer, loss_fn
        self._reduction = Reduction() if reduction is None else reduction
        self._move = move or (lambda batch: move_to(next(model.parameters()).device, batch))
        self._around, self._others = around, others
        rank, world_size = self._reduction.rank, self._reduction.world_size
        watch = LoadingWatch(keeps_order=settings.unit is not None) if settings.check_per_sample else None
        drawing: Any = {**settings.drawing, "watch": watch}
        self._drawn = private_dataloader(loader, **drawing, rank=rank, world_size=world_size)
        self._length = planned_length(*length, self._drawn.facts)
        self.state = state = PrivacyState.of(settings, history)
        self.loader = LogicalBatches(self._drawn, lambda: steps_left(state), self._begin_order)
        self._noise = settings.make_noise(rank)
        self._fit: LoopFit | None = None
        self._loaded: dict[str, Any] | None = None
        self._losses = []
        self._guard, self._tuning = ReleaseGuard(model), ProcessTuning(settings.tune_process)
        self._tuning.start(on_cpu=self._device.type == "cpu")
        self._guard.start()
        self._undo: list[Callable[[], None]] = [self._guard.stop, self._noise.close, self._tuning.stop]
        self._finalizer = weakref.finalize(self, _call_all, self._undo)
        _open[model] = weakref.ref(self)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    @property
    def is_on_trial(self) -> bool:
        """True while the loss function runs without effect, in a check or on a further microbatch."""
        return self._guard.in_sandbox > 0

    # ---------------------------------------------------------------- the step

    def step(self, batch: Any) -> None:
        """Take one private step on a logical batch: clipping, ledger, noise, optimizer.

        Before the first step, and at some later ones, the loss function is tried on a few records in the sandbox.

        Args:
            batch: from ``loader``; each is used once.

        Raises:
            PrivacyError: continuing would void the guarantee.
            ValueError: a loss of the wrong shape.
        """
        self.backward(batch)
        self._optimizer.step()

    def backward(self, batch: Any, loss_fn: LossFunction | None = None) -> None:
        """Give the parameters their private gradient of a logical batch, and write the ledger entry.

        Later changes are post-processing: clip ``p.grad`` in place if you like, and step the optimizer.

        Args:
            batch: from ``loader``; each is used once.
            loss_fn: (model, batch) -> loss; default: the run's.
        """
        if not self._finalizer.alive:
            raise RuntimeError(
                "The private run is closed, so nothing records the gradients of samples. Make a new one with "
                "history=<this run>."
            )
        begins_pass = self.loader.use(batch)
        begin_batch(self, begins_pass=begins_pass)
        if self._fit is None:
            self._fit = self._begin()
        with kept_generators(self._device), self._guard.working(), self._around(), torch.enable_grad():
            self._losses = self._fit.run(batch, loss_fn or self._loss_fn, begins_pass=begins_pass)
        self._guard.released()

    def _begin_order(self) -> None:
        """Make the loader resume at the right batch, if the noise needs the order of the data."""
        if self.settings.noise is not None:
            begin_order(self.plan.correlation, self._drawn, self.state.steps_taken)

    def _begin(self) -> LoopFit:
        """Check the loaded state, then make the private step."""
        saving.check_loaded(self._model, self._optimizer, self.state, self._loaded, self.settings)
        self.state.check_history(self._model)
        fit = LoopFit(
            self._model,
            self._called,
            self._optimizer,
            self._drawn,
            move=self._move,
            guard=self._guard,
            settings=self.settings,
            state=self.state,
            mechanisms=self.mechanisms,
            reduction=self._reduction,
            noise=self._noise,
            others=self._others,
        )
        self._undo.append(fit.step.close)
        return fit

    # ---------------------------------------------------------------- what is public

    @property
    def plan(self) -> DPPlan:
        """The public settings of the run, made with calibrated noise at the first access."""
        state = self.state
        if state.plan is None:
            if self.mechanisms.extra_records:
                raise ValueError(
                    "Expected no extra_records in a loop of your own, got some. Audit with canaries in gradient space "
                    "(mechanisms.add(canaries=...)), or under a Trainer."
                )
            saving.note_loaded(self._model, self._loaded)
            state.count_earlier_runs(self._model)
            state.plan = build_plan(state, self.settings, self._drawn.facts, self.mechanisms, self._length)
            self.settle_limit()
        return state.plan  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- saving, closing

    def state_dict(self) -> dict[str, Any]:
        """Return ledger, plan and position as plain values; save them with model and optimizer, in one file.

        Under the key "lightning_dp", ``history=`` and ``lightning-dp card`` can read the file.
        """
        return saving.dump(self._model, self._optimizer, self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume a saved run; also load the model and the optimizer that were saved with it, before the next step.

        Args:
            state: result of ``state_dict``.

        Raises:
            PrivacyError: a damaged state, or one of another run.
            RuntimeError: this run has taken steps already.
        """
        if self._fit is not None:
            raise RuntimeError(
                "This run has taken steps, and what they spent cannot be undone by loading. Load into a new run, "
                "before its first step."
            )
        saving.load(self.state, state)
        self._loaded = state

    def close(self) -> None:
        """Remove all hooks from the model and end the threads of the run; ledger and statement remain readable."""
        self._finalizer()
        _open.pop(self._model, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in reversed(functions):
        function()
