"""Triton kernels of linfast, installed as ``linfast.kernels``: one file an op. None has run on a GPU yet."""
