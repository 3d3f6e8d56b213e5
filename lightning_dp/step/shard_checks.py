"""Functions that refuse, by name and before any data is touched, features that sharded modules do not support."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_dp.step import units
from lightning_dp.step.mechanisms import Mechanisms
from lightning_dp.step.settings import Settings
from lightning_dp.system.local import is_sharded


def check_sharded(
    module: nn.Module, settings: Settings, mechanisms: Mechanisms, *, world_size: int, device: torch.device
) -> None:
    """Check that a sharded module can be trained privately with these settings, or raise ValueError."""
    if not any(units.is_unit(each) for each in module.modules()):
        raise ValueError(
            f"Expected {type(module).__name__}.configure_model to shard the module, got no module that fully_shard was "
            "applied to. Call torch.distributed.fsdp.fully_shard(layer, mesh=self.device_mesh['data_parallel']) "
            "there, or use DPDDPStrategy."
        )
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            _check_parameter(name, parameter, world_size, device)
    if settings.counts_samples_alone:
        raise ValueError(
            "Expected samples to run together in a sharded module, got microbatch_size=1. Raw gradients of single "
            "samples would be added over the processes: use microbatch_size >= 2, or DPDDPStrategy."
        )
    settings.make_clipping().check_scales(
        "a sharded module",
        "No process holds whole per-sample gradients: use 'flat', 'per_layer', 'automatic' or 'psac'.",
    )
    if settings.noise is not None:
        raise ValueError(
            f"Expected independent noise in a sharded module, got noise={settings.noise!r}. Its history was not tried "
            "in parts: leave noise out, or use DPDDPStrategy."
        )
    if settings.public_optimizers:
        raise ValueError(
            "Expected private optimizers only in a sharded module, got "
            f"public_optimizers={settings.public_optimizers!r}. Pass () or use DPDDPStrategy."
        )
    for mechanism, what in (
        (mechanisms.canaries, "canaries in gradient space (PrivacyAudit(space='gradient'))"),
        (mechanisms.diagnostics, "GradientDiagnostics"),
    ):
        if mechanism.reads_sums:
            raise ValueError(
                f"Expected sums that no process holds whole, got {what}, which reads them. Leave it out, or use "
                "DPDDPStrategy."
            )


def _check_parameter(name: str, parameter: Any, world_size: int, device: torch.device) -> None:
    mesh, placements = parameter.device_mesh, parameter.placements
    by_rows = len(placements) == 1 and placements[0].is_shard(0)
    if mesh.size() != world_size or not by_rows:
        raise ValueError(
            f"Expected parameters sharded along their first axis over all {world_size} processes, got {name!r} with "
            f"placements {tuple(placements)} over a mesh of shape {tuple(mesh.shape)}. Tensor parallel and hybrid "
            "sharding are not supported: pass mesh=self.device_mesh['data_parallel'] and no shard_placement_fn to "
            "fully_shard."
        )
    if parameter.device.type != device.type:
        raise ValueError(
            f"Expected parameters on {device.type}, got {name!r} on {parameter.device.type}. Sums and noise are made "
            "where the parameters are: leave CPUOffloadPolicy out."
        )
