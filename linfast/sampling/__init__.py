"""Sampling with a time-dependent Linearizer: step by step, in one step, inverted, and in streams of any length."""

from .collapsed import collapse
from .sampler import generator, invert, sample
from .stream import sample_stream

__all__ = ["collapse", "generator", "invert", "sample", "sample_stream"]
