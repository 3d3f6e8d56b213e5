"""Tuning of the process: the memory allocator and OpenMP threads."""
