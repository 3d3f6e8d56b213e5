"""Private training in N processes on any number of nodes: one all-reduce of sums per logical step, no
DistributedDataParallel.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_dp.step.history import carry, note_values, of_first_rank
from lightning_dp.step.reduction import AllReduce, Reduction
from lightning_dp.step.units import start_equal
from lightning_dp.strategies import _lightning
from lightning_dp.strategies.base import PrivateStrategy
from lightning_dp.strategies.single_device import DPStrategy
from lightning_dp.strategies.together import Together


class _LedgerLauncher(_lightning.MultiProcessingLauncher):
    """A launcher that returns the privacy state from spawned or forked processes, together with the weights.

    Only the main process knows which runs have trained the module before.
    """

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            strategy: Any = trainer.strategy
            strategy.state.count_earlier_runs(trainer.lightning_module)
            carry(trainer.lightning_module.parameters(), strategy.ledger)
        return super().launch(function, *args, trainer=trainer, **kwargs)

    @override
    def get_extra_results(self, trainer: pl.Trainer) -> dict[str, Any]:
        strategy: Any = trainer.strategy
        return {**super().get_extra_results(trainer), "lightning_dp": pickle.dumps(strategy.state.handover())}

    @override
    def update_main_process_results(self, trainer: pl.Trainer, extra: dict[str, Any]) -> None:
        state = pickle.loads(extra.pop("lightning_dp"))  # from a process of our own
        super().update_main_process_results(trainer, extra)
        strategy: Any = trainer.strategy
        strategy.state.take_over(state)
        if trainer.state.fn == TrainerFn.FITTING:
            carry(trainer.lightning_module.parameters(), strategy.ledger)
            note_values(trainer.lightning_module.parameters())


class DPDDPStrategy(Together, PrivateStrategy, DDPStrategy):
    """Differentially private training of any LightningModule in several processes, on one machine or many.

    Every rank draws its own part of each Poisson sample, clips its samples and adds 1/W of the noise variance; one
    all-reduce per logical step adds the sums of all W ranks, and one of a single number agrees on checks.
    ``batch_size`` of the loader is per process, so that
    ``expected_batch_size = batch_size x world_size x accumulate_grad_batches``. Replicas start equal and stay equal.

    **Guarantee**: as for ``DPStrategy``, for the data of all ranks together.

    Args:
        ARGUMENTS

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1.
    """

    #: Options of ``DistributedDataParallel`` that are accepted: they tune a wrapper that is not used here.
    options_without_effect = (
        "broadcast_buffers", "bucket_cap_mb", "check_reduction", "find_unused_parameters", "gradient_as_bucket_view",
        "static_graph",
    )  # fmt: skip

    @override
    def setup_environment(self) -> None:
        """Start the processes, after refusing options that would change the sum over ranks."""
        refused = {
            "ddp_comm_hook": self._ddp_comm_hook,
            "ddp_comm_state": self._ddp_comm_state,
            "ddp_comm_wrapper": self._ddp_comm_wrapper,
            "model_averaging_period": self._model_averaging_period,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(
                    f"Expected no {name}, got {name}={value!r}. Gradients are clipped and summed once per step without "
                    "DistributedDataParallel, so it would never be called: leave it out."
                )
        super().setup_environment()

    @override
    def make_reduction(self) -> Reduction:
        return AllReduce(self.global_rank, self.world_size, self.root_device)

    @override
    def configure_ddp(self) -> None:
        """Copy the state of rank 0 to every replica, without a wrapper of the module, because gradients are summed once
        per step.
        """
        start_equal(self.module)
        self.state.ledger = of_first_rank(self.ledger, self.broadcast(self.ledger.state_dict()))

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; in the sandbox, for none."""
        if not self.is_on_trial:
            super().barrier(*args, **kwargs)

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        launcher = _lightning.launcher_of(self)
        if isinstance(launcher, _lightning.MultiProcessingLauncher):
            _lightning.set_launcher(self, _LedgerLauncher(self, start_method=_lightning.start_method(launcher)))

    @override
    def determine_ddp_device_ids(self) -> Any:
        return None if self.root_device.type in ("cpu", "mps") else [self.root_device.index]


def document(kind: type) -> None:
    """Fill in the arguments section of a strategy's docstring, because all strategies take the same arguments."""
    text = DPStrategy.__doc__ or ""
    arguments = text[text.index("    Args:\n") : text.index("\n\n    Raises:")]
    kind.__doc__ = (kind.__doc__ or "").replace("    Args:\n        ARGUMENTS", arguments)


document(DPDDPStrategy)
