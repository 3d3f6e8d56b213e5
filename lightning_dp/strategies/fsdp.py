"""Private training of a module that no single device can hold: parameters sharded over N processes (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.step.history import of_first_rank
from lightning_dp.step.reduction import Reduction, communicating
from lightning_dp.step.shard_checks import check_sharded
from lightning_dp.step.shards import Shards
from lightning_dp.step.units import start_equal
from lightning_dp.strategies import sharded_files
from lightning_dp.strategies.base import PrivateStrategy
from lightning_dp.strategies.ddp import document
from lightning_dp.strategies.together import Together


class _WholeFolders(ModelParallelStrategy):
    """Lightning's strategy, with sharded checkpoints that stay complete if a process dies at any moment."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not self._save_distributed_checkpoint or storage_options is not None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        sharded_files.save(checkpoint, path, rank=self.global_rank, barrier=self.barrier)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if self.is_global_zero:
            sharded_files.recover(path)
        self.barrier()
        if path.is_dir():
            try:
                checkpoint = super().load_checkpoint(path, weights_only)
            except CheckpointException:  # on all ranks; files of two checkpoints may be the reason
                sharded_files.check(sharded_files.read_meta(path, weights_only), path)
                raise
            sharded_files.check(checkpoint, path)
            return checkpoint
        stateless = sharded_files.find_stateless(path, weights_only)
        if not any(stateless):
            return super().load_checkpoint(path, weights_only)
        if not all(stateless):
            raise ValueError(
                f"Expected optimizers that all have state or all have none in {path.name}, got both kinds. Torch "
                "cannot load the state of some optimizers from one file: leave save_distributed_checkpoint=False out."
            )
        optimizers, self.optimizers = self.optimizers, []  # the loaders of Lightning and torch fail without a state
        try:
            checkpoint = super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = optimizers
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            sharded_files.load_groups(optimizer, state)
        return checkpoint


class DPFSDPStrategy(Together, PrivateStrategy, _WholeFolders):
    """Differentially private training of a LightningModule whose parameters are sharded over several processes (FSDP2).

    The module applies ``torch.distributed.fsdp.fully_shard`` in ``configure_model``, as for Lightning's
    ``ModelParallelStrategy``; nothing else changes. Every rank clips its own samples. The clipped sums are scattered
    unit by unit, so that a rank holds sum, noise and gradient of its own rows only. ``batch_size`` of
    the loader is per process, so that ``expected_batch_size = batch_size x world_size x accumulate_grad_batches``.

    **Guarantee**: as for ``DPStrategy``, for the data of all ranks together.

    Refused: ``tensor_parallel_size`` above 1, hybrid sharding, ``CPUOffloadPolicy``, ``microbatch_size=1``, ``TopAgg``,
    public optimizers, correlated noise, ``fix=True``, canaries in gradient space, ``GradientDiagnostics``. ``memory``
    is always "lean".

    Args:
        ARGUMENTS

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1.
    """

    @override
    def setup_environment(self) -> None:
        """Start the processes, all in one data-parallel group."""
        if self._tensor_parallel_size not in ("auto", 1):
            raise ValueError(
                f"Expected tensor_parallel_size=1, got tensor_parallel_size={self._tensor_parallel_size!r}. A rank "
                "would hold parts of samples, and norms of parts do not add up in sequence-parallel layers: shard "
                "over all devices."
            )
        if self._fixes:
            raise ValueError(
                "Expected fix=False with sharded parameters, got fix=True. Layers would be replaced after they were "
                "sharded: call lightning_dp.fix in configure_model, before fully_shard."
            )
        self._tensor_parallel_size = 1
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def make_reduction(self) -> Reduction:
        return Shards(self.module, self.global_rank, self.world_size, self.root_device)

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the optimizers; in a fit, first check the sharded module and copy replicated parameters from rank 0."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_sharded(
                self.module, self.settings, self.mechanisms, world_size=self.world_size, device=self.root_device
            )
            start_equal(self.module)
            self.state.ledger = of_first_rank(self.ledger, self.broadcast(self.ledger.state_dict()))
        super().setup_optimizers(trainer)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state; allow the step of length 0 by which torch initialises a missing state."""
        with self._optimizers_may_step():
            return super().optimizer_state(optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights, optimizers and ledger into any number of processes."""
        with self._optimizers_may_step():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self.state.ledger = of_first_rank(self.ledger, self.broadcast(self.ledger.state_dict()))
        return checkpoint

    def _optimizers_may_step(self) -> AbstractContextManager[None]:
        return nullcontext() if self._fit is None else self._fit.guard.paused()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a logical batch; explain an error in its communication if another process was lost."""
        with communicating("a forward", among_others=True):
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Back-propagate one microbatch; explain an error in its communication if another process was lost."""
        with communicating("a backward", among_others=True):
            return super().backward(*args, **kwargs)


document(DPFSDPStrategy)
