"""Tuning of the process: memory allocator, OpenMP threads."""

from lightning_dp.system.tuning import ProcessTuning

__all__ = ["ProcessTuning"]
