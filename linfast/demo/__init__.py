"""``linfast demo``: train a small Linearizer on digits by one-step flow matching, and look at it."""

from .run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
