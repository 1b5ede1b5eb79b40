"""The public callables: those of a module's ``__all__``, and the public methods and operators of its classes."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

MODULES = (
    "linfast", "linfast.ops", "linfast.flows", "linfast.flows.reversible", "linfast.operators", "linfast.sampling",
    "linfast.training", "linfast.examples.trainer", "linfast.io", "linfast.linearizer", "linfast.accelerate",
    "linfast.compat.linearizer",
)  # fmt: skip
OPERATORS = ("__matmul__", "__add__", "__sub__", "__mul__", "__truediv__", "__pow__")


def parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that a caller can pass by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = inspect.signature(function).parameters.values()
    is_method = not isinstance(function, type) and "." in function.__qualname__
    return [p for i, p in enumerate(given) if p.kind in named and not (is_method and i == 0)]


def public_callables() -> dict[str, Callable[..., Any]]:
    """Name -> function, for all that take arguments.

    A class stands for its constructor. A method is listed under the class that defines it, for all that inherit it.
    """
    found: dict[str, Callable[..., Any]] = {}
    for module in MODULES:
        importlib.import_module(module)
        for name in sys.modules[module].__all__:
            value = getattr(sys.modules[module], name)
            if inspect.isclass(value) and not issubclass(value, Exception):
                found |= dict(_of_class(value))
            elif inspect.isfunction(value):
                found[name] = value
    return {name: function for name, function in found.items() if parameters_of(function)}


def _of_class(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield _label(cls), cls
    for base in cls.__mro__:
        if not base.__module__.startswith("linfast"):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and (name in OPERATORS or not name.startswith("_")):
                yield f"{_label(base)}.{name}", function


def _label(cls: type) -> str:
    """Distinguishes two classes of one name: linfast.compat.linearizer also has a Linearizer."""
    where = next((part for part in ("compat", "accelerate") if part in cls.__module__), None)
    return (
        f"{where}.{cls.__qualname__}"
        if where and cls.__qualname__ in ("Linearizer", "MLP", "G")
        else cls.__qualname__
    )
