"""The functions for teachers' votes, shared with ``TopAgg``: see ``lightning_dp.clipping.votes``."""

from lightning_dp.clipping.votes import SIGNS, threshold_votes, top_k_votes

__all__ = ["SIGNS", "threshold_votes", "top_k_votes"]
