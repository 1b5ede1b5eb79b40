"""Sampling with a time-dependent Linearizer: step by step, in one step, and back."""

from .propagator import collapse
from .sampler import generator, invert, sample

__all__ = ["collapse", "generator", "invert", "sample"]
