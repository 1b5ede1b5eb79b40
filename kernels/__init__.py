"""Triton kernels of linfast, installed as ``linfast.kernels``: one file an op, none yet."""
