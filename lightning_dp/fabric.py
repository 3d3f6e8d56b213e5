"""FabricPrivacy: private training in the user's own loop with Lightning Fabric, on one device or with DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from lightning_dp.accounting import Ledger
from lightning_dp.loop.batches import LogicalBatches
from lightning_dp.loop.host import LossFunction
from lightning_dp.loop.run import PrivateLoop
from lightning_dp.step.arguments import PrivateArguments, check_length, make_settings
from lightning_dp.step.history import History
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.plan import DPPlan
from lightning_dp.step.reduction import AllReduce, Reduction
from lightning_dp.step.units import start_equal
from lightning_dp.strategies._lightning import in_fabric_backward
from lightning_dp.strategies.together import Collectives, in_fabric

_UNSUPPORTED_PRECISION = ("16-mixed", "16-true", "transformer-engine", "transformer-engine-float16")


class FabricPrivacy:
    """Private training in the user's own Fabric loop; ``backward`` takes a loss function instead of a loss.

    A private step calls the loss function several times: on each microbatch, on a few records to check that samples are
    independent, and on a dummy record of weight 0 for an empty batch.

    **Guarantee**: as for ``PrivateLoop``, for the data of all ranks together. Gradients are summed once per step; the
    model is never wrapped in ``DistributedDataParallel``. ``batch_size`` of the loader is per process.

    Args:
        epochs: planned passes over the data; ``target_epsilon`` needs this or ``steps``.
        steps: planned logical steps of the whole run.
        history: privacy spent by earlier runs on the same data, as for ``DPStrategy``.
        **arguments: as for ``DPStrategy``, without ``public_optimizers`` and ``strict_logging``.

    Raises:
        ValueError: an argument out of range.
        TypeError: an argument of the wrong type.

    Example::

        fabric = Fabric(accelerator="cpu", devices=2)
        fabric.launch()
        dp = FabricPrivacy(target_epsilon=3.0, epochs=10)
        model, optimizer, loader = dp.setup(fabric, model, optimizer, loader)
        for epoch in range(10):
            for batch in loader:
                dp.backward(loss_fn, batch)      # loss_fn(model, batch) -> loss
                optimizer.step()
            fabric.log("epsilon", dp.epsilon())
        fabric.save("last.ckpt", {"model": model, "optimizer": optimizer, "lightning_dp": dp})
    """

    def __init__(
        self,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        history: History = None,
        **arguments: Unpack[PrivateArguments],
    ) -> None:
        self.settings = make_settings(arguments, owner="FabricPrivacy")
        check_length(epochs, steps, self.settings)
        self._length, self._history = (epochs, steps), history
        self._loop: PrivateLoop | None = None

    def setup(
        self, fabric: Fabric, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]
    ) -> tuple[Any, Any, LogicalBatches]:
        """Set up model, optimizer and loader for private training, without DDP's wrapper.

        Args:
            fabric: a launched Fabric.
            model: as for ``fabric.setup``.
            optimizer: optimizer of parameters of the model.
            loader: the user's loader, not set up by Fabric.

        Returns:
            Model and optimizer in Fabric's wrappers, and the private loader. Use them in the loop.

        Raises:
            ValueError: a strategy or precision without private training.
            PrivacyError: a layer that mixes samples.
        """
        check_fabric(fabric)
        if self._loop is not None:
            self._loop.close()
        with _unwrapped(fabric):
            wrapped, stepping = fabric.setup(model, optimizer)
        reduction = Reduction()
        if fabric.world_size > 1:
            start_equal(model)
            reduction = AllReduce(fabric.global_rank, fabric.world_size, fabric.device)
        self._loop = PrivateLoop(
            model,
            optimizer,
            loader,
            _no_loss,
            settings=self.settings,
            length=self._length,
            history=self._history,
            reduction=reduction,
            called=wrapped,
            move=fabric.to_device,
            around=lambda: self._around(fabric.strategy, reduction),
        )
        return wrapped, stepping, self._loop.loader

    @contextmanager
    def _around(self, strategy: Any, reduction: Reduction) -> Iterator[None]:
        """Let backwards run without Fabric, and ranks not communicate in the sandbox, within a block."""

        def now() -> Collectives:
            return Collectives(reduction, reduction.rank, reduction.world_size, self.loop.is_on_trial)

        with in_fabric_backward(), in_fabric(strategy, now) if reduction.world_size > 1 else nullcontext():
            yield

    @property
    def loop(self) -> PrivateLoop:
        """The private run that ``setup`` made.

        Raises:
            RuntimeError: ``setup`` was not called.
        """
        if self._loop is None:
            raise RuntimeError(
                "FabricPrivacy has no model yet, so there is nothing to train or report. Call dp.setup(fabric, model, "
                "optimizer, loader) first."
            )
        return self._loop

    def backward(self, loss_fn: LossFunction, batch: Any) -> None:
        """Set the private gradients of a logical batch as ``grad`` of the parameters, and record the release.

        Args:
            loss_fn: (model, batch) -> mean loss of shape () or per-sample losses of shape (B,); gets Fabric's model.
            batch: logical batch from the private loader, used once.

        Raises:
            TypeError: a loss in place of a loss function.
            PrivacyError: continuing would void the guarantee.
        """
        if not callable(loss_fn):
            raise TypeError(
                "Expected backward(loss_fn, batch) with a function (model, batch) -> loss, got "
                f"{type(loss_fn).__name__}. A loss cannot be computed again for microbatches and checks: pass the "
                "function that computes it."
            )
        self.loop.backward(batch, loss_fn)

    # ---------------------------------------------------------------- what is public

    @property
    def mechanisms(self) -> Mechanisms:
        """Schedules, bounds, masks and limits of the run, to be added by ``mechanisms.add`` before the first step."""
        return self.loop.mechanisms

    @property
    def plan(self) -> DPPlan:
        """The public settings of the run."""
        return self.loop.plan

    @property
    def ledger(self) -> Ledger:
        """The ledger of all releases so far."""
        return self.loop.ledger

    @property
    def steps_taken(self) -> int:
        """Number of logical steps of this run so far."""
        return self.loop.steps_taken

    @property
    def steps_left(self) -> float:
        """Number of logical steps until the planned end of the run or of its budget; infinite if unbounded."""
        return self.loop.steps_left

    @property
    def nonprivate_loss(self) -> float:
        """Mean loss of the last logical batch on this rank. NOT private: once read, the privacy statement names it."""
        return self.loop.nonprivate_loss

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, computed from the ledger; public.

        Args:
            delta: in (0, 1); default: the plan's.
        """
        return self.loop.epsilon(delta)

    def privacy_statement(self) -> str:
        """Return the privacy statement: epsilon, delta, relation, sampling, accountant and exclusions."""
        return self.loop.privacy_statement()

    # ---------------------------------------------------------------- saving, closing

    def state_dict(self) -> dict[str, Any]:
        """Return ledger, plan and position for a checkpoint; ``fabric.save`` calls this for objects in its state."""
        return self.loop.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume a saved run; ``fabric.load`` calls this. Also load the model and optimizer that were saved with it.

        Args:
            state: dictionary that ``state_dict`` returned.
        """
        self.loop.load_state_dict(state)

    def close(self) -> None:
        """Remove all hooks from the model; ledger and statement remain available."""
        self.loop.close()


def check_fabric(fabric: Fabric) -> None:
    """Check that private training supports a Fabric's strategy and precision.

    Raises:
        ValueError: an unsupported strategy or precision.
    """
    if not isinstance(fabric.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"Expected Fabric on one device or with DDP, got {type(fabric.strategy).__name__}. It shards or replicates "
            "the model in a way that per-sample gradients do not follow: use Fabric(devices=1) or "
            "Fabric(strategy='ddp')."
        )
    precision = str(fabric.strategy.precision.precision)
    if precision in _UNSUPPORTED_PRECISION:
        raise ValueError(
            f"Expected a precision with float32's range, got Fabric(precision={precision!r}). Scaled or overflowing "
            "gradients would be clipped: use precision='bf16-mixed'."
        )


@contextmanager
def _unwrapped(fabric: Fabric) -> Iterator[None]:
    """Prevent Fabric's strategy from wrapping a module in ``DistributedDataParallel`` within a block."""
    strategy: Any = fabric.strategy
    strategy.__dict__["setup_module"] = lambda module: module
    try:
        yield
    finally:
        del strategy.__dict__["setup_module"]


def _no_loss(model: Any, batch: Any) -> Any:
    raise AssertionError("backward passes the loss function")
