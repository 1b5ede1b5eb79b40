"""Kernels compiled ahead of time for real GPUs, without one, and what the machine code says."""
