"""Private training on one device: CPU, CUDA or Apple's MPS."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_dp.strategies.base import PrivateStrategy


class DPStrategy(PrivateStrategy, SingleDeviceStrategy):
    """Differentially private training of any LightningModule on one device: CPU, CUDA or Apple's MPS.

    A logical step ``t`` is one optimizer step over one Poisson sample ``S_t`` of the data (each record joins with
    probability ``q = expected_batch_size / dataset_size``):

        G~ = sum_{i in S_t} factor_i g_i + N(0, (sigma_t C)^2 I),     p.grad = G~ / expected_batch_size

    where ``g_i`` is the gradient of one sample's loss and ``||factor_i g_i|| <= C``. Module and datamodule stay
    unchanged; checkpoints keep the module's own keys.

    **Guarantee**: the weights after any number of steps are (epsilon, delta)-differentially private at
    ``epsilon(delta)``, for the relation between neighbouring datasets in ``neighboring_relation``, provided that the
    forward pass treats samples independently (checked at the first and some later batches) and that only the module's
    parameters carry data, no other state. NOT covered: figures that ``training_step`` logs, validation data, and
    choices made by looking at either.

    Three groups of arguments: the promise (to ``allow_public_checkpoint``), its cost (to ``tune_process``), the checks.

    Args:
        target_epsilon: calibrate the noise so that the whole planned run ends at this epsilon or just below.
        noise_multiplier: noise std over sensitivity, >= 0. Exactly one of this and ``target_epsilon``; 0 is a legal
            ablation whose epsilon is infinite.
        target_delta: delta, in (0, 1). Default: 1 / (10 x dataset size) rounded down to a power of ten; printed.
        neighboring_relation: "add_or_remove_one", "replace_one" (doubles the sensitivity) or "zero_out".
        unit: protect users with all their records instead of single records: one id of a user per record (array, tensor
            or list), or the key or position at which items hold it. Default: with ``records_per_unit``, the
            ``unit_ids`` of the datamodule (an attribute or a method). Batch size, sample rate and delta then count
            users.
        records_per_unit: most records G that a user brings to one batch, drawn again for each batch; a public number.
        history: privacy spent by earlier private runs on the same data: a ``Ledger``, a strategy, the path of a
            checkpoint, or a list of these. It counts towards target and budget. Left out, runs of this process on
            the same weights, or on copies of them, count; ``[]`` states that the runs have no record in common.
        public_optimizers: positions, in the result of ``configure_optimizers``, of optimizers whose parameters never
            receive a gradient from the data (a GAN's generator). Checked at the first batch.
        secure_rng: draw the noise from a cryptographic generator against floating-point attacks (slower).
        seed: for tests only: makes sampling and noise predictable, which voids the guarantee against those who know it.
        allow_public_checkpoint: accept a checkpoint without a ledger, asserting that it never saw private data.
        max_grad_norm: clipping norm C > 0 of one sample's gradient; "automatic" and "psac" do not use it.
        clipping: "flat", "per_layer", "automatic", "psac", "none" or a ``Clipping``.
        sampling: "poisson"; "shuffle": each record in exactly one batch per pass (streams need it); or "cyclic": the
            same batches in every pass, for correlated noise.
        noise: ``CorrelatedNoise()`` for data in a fixed order ("cyclic", or a stream): noise that cancels between
            steps. The whole run is one privacy event; it can be cut short but not extended. Default: independent noise.
        fixed_order: promise that a stream yields its records in the same order in every pass.
        unit_gradient: "mean" or "sum" over a user's records, clipped once.
        accountant: "pld" (tight), "rdp", "prv", "gdp" (nothing sampled) or "tcdp" (a loose cross-check).
        microbatch_size: most samples on the device at once; results do not depend on it. 1 runs each sample alone and
            supports every module. Default: the whole logical batch at once.
        memory: "fast" or "lean".
        grad_sample: "auto": rules on operations, for whole batches, and one record at a time by plain autograd where no
            rule can follow the module and samples are independent, which is said once; "rules": an error there;
            "single": one record at a time, for any module; "materialize": explicit per-sample gradients of every layer
            (the reference).
        loss_reduction: "mean" or "sum": how a scalar loss combines the samples. "auto": a mean, or a sum if the checks
            before the first step show that it is one, which is said once. A loss of shape (B,) needs neither.
        fix: replace layers that cannot be trained privately (BatchNorm), as ``lightning_dp.fix`` does, before the
            optimizers are made. It changes what such layers compute.
        per_sample_loss: let each record's own loss count, as computed on that record alone, where the loss of a batch
            shares a denominator (padded tokens). This is another objective than the loss of the batch. Records run
            together where the own losses can be had from a batch, which is compared with records run alone.
        tune_process: tune the memory allocator and OpenMP threads of the process while a fit runs.
        check_per_sample: test on a few records, at the first and some later batches, that samples are independent.
        strict_logging: drop all figures that hooks of the training loop log (``self.log``, ``self.log_dict``, and
            ``log_metrics`` of a logger within ``training_step``), except names that begin with ``nonprivate/``,
            validation logs and epsilon. ``privacy_statement()`` names all figures that were logged without noise.
        **strategy_options: arguments of the Lightning strategy.

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    References:
        Abadi et al. 2016, Deep Learning with Differential Privacy, Algorithm 1.
    """

    _devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device that the Trainer chose, in a list; None until the Trainer has chosen."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise ValueError(
                f"Expected one device, got `Trainer(devices={len(devices)})`. DPStrategy trains on one: use "
                "DPDDPStrategy, which takes the same arguments, or `Trainer(devices=1)`."
            )
        self._devices = devices

    @property
    def num_nodes(self) -> int:
        """The number of nodes: always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise ValueError(
                f"Expected one node, got `Trainer(num_nodes={num_nodes})`. DPStrategy trains on one device: use "
                "DPDDPStrategy, which takes the same arguments."
            )

    @property
    @override
    def root_device(self) -> torch.device:
        return self._devices[0] if self._devices else self._root_device
