"""Counts the layers of known libraries for which linfast has no formula, so that the report can name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .adapter import adapter_for, parent_adapter
from .identity import find_class, original_class


@dataclass(frozen=True)
class Layers:
    """The layers of one library: the classes of its package that derive from one base class.

    Args:
        library: the package's name.
        where: the module that defines the base class.
        base: the base class's name.
        passed_by: names of the layers that are not counted: those that only run other layers, linear maps and
            permutations, and simple functions of each value, such as a batch norm or a sigmoid.
    """

    library: str
    where: str
    base: str
    passed_by: tuple[str, ...]


LAYERS: dict[str, Layers] = {}
"""By package. memcnn has no entry: its couplings have adapters, and its other modules only run them."""


def unknown_layers(modules: Iterable[nn.Module]) -> tuple[tuple[str, int], ...]:
    """(library and class, count) of the learned layers without an adapter, of a model's modules, outer ones first.

    A layer counts if the library itself defines its class, ``Layers`` does not pass it by, and it has parameters.
    Modules inside such a layer or inside a recognised coupling do not count. Nor do instances of classes that
    derive from a recognised one: the report has rows for them.
    """
    inside: set[nn.Module] = set()
    counts: Counter[str] = Counter()
    for module in modules:
        if module in inside:
            continue
        adapter = adapter_for(module) or parent_adapter(module)
        name = _name_of(original_class(module)) if adapter is None else None
        if name is not None and any(True for _ in module.parameters()):
            counts[name] += 1
        if name is not None or (adapter is not None and not adapter.chain):
            inside.update(module.modules())
    return tuple(counts.items())


def _name_of(cls: type) -> str | None:
    """Library and class, if the class is one of the layers that count."""
    layers = LAYERS.get(cls.__module__.partition(".")[0])
    if layers is None or cls.__qualname__ in layers.passed_by:
        return None
    base = find_class(layers.where, layers.base)
    return f"{layers.library} {cls.__qualname__}" if base is not None and issubclass(cls, base) else None
