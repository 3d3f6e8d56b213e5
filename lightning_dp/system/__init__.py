"""Tuning of the process: memory allocator, OpenMP threads, reused buffers."""

from lightning_dp.system.tuning import ProcessTuning

__all__ = ["ProcessTuning"]
