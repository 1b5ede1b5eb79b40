"""The research repository (github.com/assafshocher/Linearizer): what makes an adapter of its classes.

People copy these classes into their own repositories, so they are recognised by name and attributes wherever
they are defined, and then by their values, as all are. ``reference_g`` has g, ``reference_unet`` its
conditioners, ``reference_linear`` the linear networks and the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .adapter import Adapter, Options, Plan

__all__ = ["constant_plan", "has", "reference_adapter"]


def has(*names: str) -> Callable[[Any], bool]:
    """Whether an instance has all these attributes; one that raises is there: it raises again where it is read."""

    def is_there(instance: Any, name: str) -> bool:
        try:
            return hasattr(instance, name)
        except Exception:
            return True

    return lambda instance: all(is_there(instance, name) for name in names)


def reference_adapter(name: str, recognises: Callable[[Any], bool], **what: Any) -> Adapter:
    return Adapter(library="reference", where=None, name=name, recognises=recognises, **what)


def constant_plan(runs: str) -> Callable[[Any, Options], Plan]:
    return lambda instance, options: Plan(runs)
