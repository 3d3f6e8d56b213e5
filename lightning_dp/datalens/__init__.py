"""DataLens: a private generator, trained by the votes of discriminators that each see their own shard of the data.

Read in this order: ``votes.py`` (one teacher's vote), ``release.py`` (ledger and noise), ``plan.py`` (public settings),
``teachers.py`` (all teachers as one stacked model), ``module.py`` (the LightningModule).
"""

from typing import TYPE_CHECKING

from lightning_dp.datalens.networks import ConvDiscriminator, ConvGenerator, MLPDiscriminator, MLPGenerator
from lightning_dp.datalens.plan import DataLensPlan, epsilon_after
from lightning_dp.datalens.samples import write_csv, write_tensors
from lightning_dp.datalens.settings import DataLensSettings
from lightning_dp.datalens.shards import StepsOver, partition
from lightning_dp.datalens.votes import threshold_votes, top_k_votes

__all__ = [
    "ConvDiscriminator",
    "ConvGenerator",
    "DataLens",
    "DataLensPlan",
    "DataLensSettings",
    "MLPDiscriminator",
    "MLPGenerator",
    "StepsOver",
    "epsilon_after",
    "partition",
    "threshold_votes",
    "top_k_votes",
    "write_csv",
    "write_tensors",
]

if TYPE_CHECKING:
    from lightning_dp.datalens.module import DataLens
else:

    def __getattr__(name):
        if name != "DataLens":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lightning_dp.datalens.module import DataLens

        globals()[name] = DataLens
        return DataLens

    def __dir__():
        return sorted({*globals(), *__all__})
