"""Tuning of the process: memory allocator, OpenMP threads, huge pages, buffers that are used again."""

from lightning_dp.system.tuning import ProcessTuning

__all__ = ["ProcessTuning"]
