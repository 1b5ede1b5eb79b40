"""Remembers the recognised couplings of a flow until an object that they were read from is replaced.

Recognising eight couplings takes a fifth of a call at batch 1. Parameters are remembered as objects, so that writes
to their values take effect. Each call checks, in loops that run in C, that every module, parameter and option is
the same object as before, of the same class, without a hook, and with as many attributes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from operator import getitem, is_
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["Remembered", "recall", "remember"]

_OPTIONS = {
    "coupling": ("features", "scale_map", "order", "layout", "moves"),
    "mlp": ("activation", "context_features", "time_features"),
}


class Remembered:
    """A value, and the facts that it depends on.

    Args:
        layers: the flow's layers.
        couplings: those layers whose weights and options the value was read from.
        key: the kind of input that it was made for.
        value: what is remembered.
    """

    def __init__(self, layers: nn.ModuleList, couplings: Iterable[Any], key: Hashable, value: Any) -> None:
        self.key, self.value = key, value
        modules: list[Any] = []
        sized: list[Any] = [layers._modules]
        facts: list[tuple[Any, str]] = [(layers._modules, name) for name in layers._modules]
        for coupling in couplings:
            mlp = coupling._modules["conditioner"]
            inside = mlp._modules["layers"]._modules
            modules += [coupling, mlp, *inside.values()]
            sized += [inside, *map(vars, modules[-2 - len(inside) :])]
            facts += [(vars(coupling), name) for name in _OPTIONS["coupling"]]
            facts += [(vars(mlp), name) for name in _OPTIONS["mlp"]]
            facts += [(coupling._modules, "conditioner"), (mlp._modules, "layers")]
            facts += [(inside, name) for name in inside]
            facts += [(linear._parameters, name) for linear in inside.values() for name in ("weight", "bias")]
        self._held, self._names = zip(*facts, strict=True)
        self._objects = [*map(getitem, self._held, self._names)]
        self._modules, self._classes = modules, [*map(type, modules)]
        self._hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self._sized, self._sizes = sized, [*map(len, sized)]

    def holds(self) -> bool:
        """Whether everything that the value was read from is unchanged."""
        if (
            any(self._hooks)
            or [*map(type, self._modules)] != self._classes
            or [*map(len, self._sized)] != self._sizes
        ):
            return False
        try:
            return all(map(is_, map(getitem, self._held, self._names), self._objects))
        except KeyError:
            return False


_remembered: WeakKeyDictionary[nn.ModuleList, Remembered] = WeakKeyDictionary()


def recall(layers: nn.ModuleList, key: Hashable) -> Any | None:
    """The value remembered for these layers and this kind of input; None where there is none that still holds."""
    found = _remembered.get(layers)
    return found.value if found is not None and found.key == key and found.holds() else None


def remember(layers: nn.ModuleList, couplings: Iterable[Any], key: Hashable, value: Any) -> None:
    """Keep ``value`` until the layers are deleted or another value is remembered for them."""
    try:
        _remembered[layers] = Remembered(layers, couplings, key, value)
    except KeyError:
        # A parameter or an option is a property or a plain attribute, as in nn.DataParallel's replicas.
        _remembered.pop(layers, None)
