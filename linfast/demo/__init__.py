"""``linfast demo``: train a small Linearizer on digits by one-step flow matching, and look at it."""

from .run import DemoSettings, run

__all__ = ["DemoSettings", "run"]
