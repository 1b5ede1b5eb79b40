"""Triton kernels of linfast, installed as ``linfast.kernels``: one file per op. None has run on a GPU yet."""
