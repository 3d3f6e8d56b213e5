"""Per-sample clipping: the bound on one sample's contribution to the sum, and the resulting sensitivity.

Read ``base.py`` (the contract) first; each other file is one kind.
"""

from lightning_dp.clipping.automatic import AutomaticClipping
from lightning_dp.clipping.base import Clipping, ExplicitClipping, FactorClipping
from lightning_dp.clipping.flat import FlatClipping
from lightning_dp.clipping.make import make_clipping
from lightning_dp.clipping.none import NoClipping
from lightning_dp.clipping.per_layer import PerLayerClipping
from lightning_dp.clipping.psac import PSACClipping
from lightning_dp.clipping.top_agg import TopAgg

__all__ = [
    "AutomaticClipping",
    "Clipping",
    "ExplicitClipping",
    "FactorClipping",
    "FlatClipping",
    "NoClipping",
    "PSACClipping",
    "PerLayerClipping",
    "TopAgg",
    "make_clipping",
]
