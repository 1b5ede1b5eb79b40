"""Kernels compiled ahead of time for real GPUs, without a GPU, and the figures of their machine code."""
