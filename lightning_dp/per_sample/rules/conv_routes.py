"""The choice between several ways to compute per-sample gradients of convolutions, by public sizes; see ``conv.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from lightning_dp.per_sample.rules.base import Call
from lightning_dp.per_sample.rules.unfolding import Conv

Route: TypeAlias = Literal["grouped", "unfold", "gram"]

# Largest temporary, in elements, before a batch of samples is worked on in blocks (512 MiB in float32).
BLOCK_ELEMENTS = 2**27

# The same for what is unfolded on a CPU, where a block should stay in the cache.
CACHED_ELEMENTS = 2**21

# Weight entries of one group above which grouped convolutions lose to unfolding on a CPU (measured): at all, and a
# position.
LARGE_WEIGHT = 2**17
WEIGHTS_A_POSITION = 2**10

# Input channels up to which grouped convolutions lose to unfolding on a CPU (measured).
FEW_CHANNELS = 4


class ConvShape(NamedTuple):
    """The public sizes on which the choice of a route may depend.

    Args:
        device: device type, such as ``"cpu"``.
        groups: ``G``.
        in_width: ``W``, width of the unfolded input of one group.
        out_width: ``O``, output channels of one group.
        positions: ``P``, output positions of one sample, over its ``K`` rows and all calls.
        kernel: number of kernel positions.
        rows: ``K``, rows of one sample.
        maps: number of different input sizes over all calls.
    """

    device: str
    groups: int
    in_width: int
    out_width: int
    positions: int
    kernel: int
    rows: int = 1
    maps: int = 1


def choose_route(shape: ConvShape, *, norms_only: bool) -> Route:
    """Return the cheapest route to per-sample gradients or, if ``norms_only``, to their norms.

    Example:
        >>> choose_route(ConvShape("cpu", 1, 2304, 256, 16, 9), norms_only=True)
        'gram'
    """
    weights = shape.in_width * shape.out_width
    if norms_only and shape.maps == 1 and shape.positions * (shape.in_width + shape.out_width) < weights:
        return "gram"
    if shape.kernel == 1 and shape.groups == 1:
        return "unfold"  # a view: nothing is unfolded
    if shape.device == "cpu":
        large = weights > min(LARGE_WEIGHT, WEIGHTS_A_POSITION * shape.positions)
        thin = shape.groups == 1 and shape.in_width <= FEW_CHANNELS * shape.kernel
        return "unfold" if large or thin else "grouped"
    return "grouped" if shape.groups > 1 else "unfold"


def shape_of(conv: Conv, calls: Sequence[Call], batch_size: int) -> ConvShape:
    """Return the public sizes of a layer's calls on a batch."""
    kernel = conv.weight[0, 0].numel()
    elements = sum(call.backprop.numel() for call in calls)
    return ConvShape(
        device=calls[0].backprop.device.type,
        groups=conv.groups,
        in_width=conv.in_channels // conv.groups * kernel,
        out_width=conv.out_channels // conv.groups,
        positions=elements // max(1, batch_size * conv.out_channels),
        kernel=kernel,
        rows=max(call.multiplicity for call in calls),
        maps=len({call.activation.shape[2:] for call in calls}),
    )


def blocks(batch_size: int, shape: ConvShape, route: Route) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples, as many at once as the block size allows; nothing for an empty batch."""
    per_sample = (
        shape.groups
        * {
            "grouped": shape.rows * shape.in_width * shape.out_width,
            "unfold": shape.in_width * (shape.positions + shape.rows * shape.out_width),
            "gram": shape.positions * (shape.in_width + (shape.kernel + 2) * shape.positions),
        }[route]
    )
    cached = shape.device == "cpu" and route == "unfold"
    step = max(1, min(BLOCK_ELEMENTS, CACHED_ELEMENTS if cached else BLOCK_ELEMENTS) // max(1, per_sample))
    for low in range(0, batch_size, step):
        yield low, min(low + step, batch_size)
