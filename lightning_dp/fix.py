"""``fix``: replacement of the layers that cannot be trained privately.

This file is light, because the package imports it at once to bind the name ``fix``. The layers are in
``_replacements.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class Fixed(NamedTuple):
    """A fixed module and the list of its changes, one sentence per replaced layer."""

    module: nn.Module
    changes: list[str]


def fix(module: nn.Module) -> Fixed:
    """Replace the layers that cannot be trained privately in a module, and no other layers.

    ==================================  ===================================================================
    layer                               becomes
    ==================================  ===================================================================
    BatchNorm, SyncBatchNorm            GroupNorm, weight and bias kept
    subclass with a ``forward``         itself, with group norm where its ``forward`` calls batch norm
    InstanceNorm, tracking              itself, without running statistics: the same in training
    ==================================  ===================================================================

    Group norm computes other outputs than batch norm, so train or fine-tune the module. A subclass without a
    ``forward`` of its own is treated as its base class. Recurrent layers and attention need no replacement.

    Submodules are replaced inside the given module without a copy, so a LightningModule keeps its hyperparameters,
    metrics and hooks. Another object is returned only if the module is itself such a layer. Call ``fix`` before
    optimizers are built, because replaced layers have new parameters. Frozen layers in evaluation mode with running
    statistics stay unchanged. ``DPStrategy(fix=True)`` and the callback ``FixModule`` call it at the right time.

    **Guarantee**: device, type, training mode and ``requires_grad`` are kept; a second call changes nothing. It does
    not make a module private: a loss or a function inside ``forward`` may still mix samples.

    Args:
        module: a module with initialised parameters.

    Returns:
        The module and a sentence per change, which begins with the layer's qualified name.

    Raises:
        TypeError: something else than a module.
        ValueError: a lazy batch norm has not seen its first batch.

    Example:
        >>> from torch import nn
        >>> module, changes = fix(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)))
        >>> module[1]
        GroupNorm(16, 32, eps=1e-05, affine=True, bias=True)
        >>> changes[0].split(";")[0]
        '1: BatchNorm2d became GroupNorm with 16 groups of 2 channels'

    References:
        Wu and He (2018), Group Normalization, section 3: 32 groups, or 16 channels per group.
    """
    from torch import nn

    from lightning_dp._replacements import replace
    from lightning_dp._validate import check_kind

    check_kind("module", module, nn.Module, "Pass the network or the LightningModule itself.")
    changes: list[str] = []
    return Fixed(replace(module, changes), changes)
