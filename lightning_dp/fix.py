"""Replace the layers of a module that cannot be trained privately.

This file is light, because the package binds the name ``fix`` when it is first imported: the layers are in
``_replacements.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class Fixed(NamedTuple):
    """A fixed module and its changes, one sentence per layer; no sentence if nothing had to change."""

    module: nn.Module
    changes: list[str]


def fix(module: nn.Module) -> Fixed:
    """Replace the layers of a module that cannot be trained privately, and no others.

    ==================================  ===================================================================
    layer                               becomes
    ==================================  ===================================================================
    BatchNorm, SyncBatchNorm            GroupNorm, weight and bias kept
    subclass with a ``forward``         itself, with group norm where its ``forward`` calls batch norm
    InstanceNorm, tracking              itself, without running statistics: the same in training
    ==================================  ===================================================================

    Group norm computes something else than batch norm: train or fine-tune. A subclass without a ``forward`` of its own
    is treated as its base. Recurrent layers and attention need no replacement.

    The submodules are exchanged inside the given module, no copy is made: a LightningModule keeps its hyperparameters,
    metrics and hooks. Only a module that is itself such a layer comes back as another object. Call it before optimizers
    are built: replaced layers have new parameters. Layers with only frozen parameters stay unchanged.
    ``DPStrategy(fix=True)`` and the callback ``FixModule`` call it at the right time.

    **Guarantee**: device, type, training mode and ``requires_grad`` are kept; a second call changes nothing. It does
    not make a module private: a loss or a function inside ``forward`` may still mix samples.

    Args:
        module: a module with initialised parameters.

    Returns:
        The module and a sentence for each change, starting with the layer's qualified name.

    Raises:
        ValueError: a lazy layer has not seen its first batch.

    Example:
        >>> from torch import nn
        >>> module, changes = fix(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)))
        >>> module[1]
        GroupNorm(16, 32, eps=1e-05, affine=True, bias=True)
        >>> changes[0].split(";")[0]
        '1: BatchNorm2d became GroupNorm with 16 groups of 2 channels'

    References:
        Wu and He (2018), Group Normalization, section 3: 32 groups, or 16 channels a group.
    """
    from lightning_dp._replacements import replace

    changes: list[str] = []
    return Fixed(replace(module, changes), changes)
