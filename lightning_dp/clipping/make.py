"""The clippings by name."""

from __future__ import annotations

from collections.abc import Callable

from lightning_dp.clipping.automatic import AutomaticClipping
from lightning_dp.clipping.base import Clipping, check_bound
from lightning_dp.clipping.flat import FlatClipping
from lightning_dp.clipping.none import NoClipping
from lightning_dp.clipping.per_layer import PerLayerClipping
from lightning_dp.clipping.psac import PSACClipping


def make_clipping(spec: str | Clipping, max_grad_norm: float) -> Clipping:
    """Return the clipping of a given name; return a ``Clipping`` unchanged.

    Args:
        spec: "flat", "per_layer", "automatic", "psac", "none", or a ``Clipping`` (``TopAgg`` has no name, because its k
            must be given).
        max_grad_norm: R for "flat" and "per_layer", the nominal scale for "none". "automatic" and "psac" do not use it,
            because they are R-independent; pass ``AutomaticClipping(max_grad_norm=...)`` for the R-dependent form.

    Returns:
        The clipping.

    Raises:
        TypeError: ``spec`` is neither a name nor a ``Clipping``.
        ValueError: an unknown name, or a bound out of range.

    Example:
        >>> make_clipping("per_layer", 0.5)
        PerLayerClipping(max_grad_norm=0.5, max_grad_norms=None, noise='least', group_weights=None)
    """
    if isinstance(spec, Clipping):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"Expected the name of a clipping or a Clipping, got {type(spec).__name__}. Pass 'flat' where in doubt."
        )
    check_bound("max_grad_norm", max_grad_norm)
    makers: dict[str, Callable[[], Clipping]] = {
        "flat": lambda: FlatClipping(max_grad_norm),
        "per_layer": lambda: PerLayerClipping(max_grad_norm),
        "automatic": AutomaticClipping,
        "psac": PSACClipping,
        "none": lambda: NoClipping(max_grad_norm),
    }
    if spec not in makers:
        raise ValueError(f"Expected clipping to be one of {list(makers)}, got clipping={spec!r}. Pick one of these.")
    return makers[spec]()
