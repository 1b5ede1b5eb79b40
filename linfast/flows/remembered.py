"""Remembers what was recognised in modules, until an object from which it was read is replaced.

Recognising eight couplings takes a fifth of a call's time at batch 1. Parameters are remembered as objects, so that
writes to their values take effect. Each call checks, in loops that run in C, that every module, parameter and
option is the same object as before, of the same class, without a hook, and with the same number of attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from operator import getitem, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..dispatch import read_at_once

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
# Modules without settings: their parameters and children describe them completely.
_PLAIN = (nn.Identity, nn.Linear, nn.ModuleList, nn.ReLU, nn.Sequential, nn.SiLU, nn.Sigmoid, nn.Tanh)


class Evidence:
    """The objects from which something was recognised, and checks that they have not changed.

    Args:
        lists: modules of which only the children must stay the same.
        modules: modules that must stay the same in full, with all modules inside them.
        functions: (class, name of a method) pairs; each method must stay the same function.
        masks: tensors whose values must stay the same; on a GPU, only writes that torch counts are noticed.
        but: names of attributes of ``modules`` that may change.
        nested: modules whose children, hooks and number of attributes must stay the same.
    """

    def __init__(
        self,
        lists: Iterable[nn.Module],
        modules: Iterable[nn.Module],
        functions: Iterable[tuple[type, str]] = (),
        masks: Iterable[Tensor] = (),
        but: Collection[str] = (),
        nested: Sequence[nn.Module] = (),
    ) -> None:
        lists = [*lists, *nested]
        self._modules = [inside for module in modules for inside in module.modules()]
        self._classes = [*map(type, self._modules)]
        self._hooks = [getattr(module, name) for module in (*self._modules, *nested) for name in HOOKS]
        children = [module._modules for module in lists]
        owned = [
            d for m in self._modules for d in (m._parameters, m._modules, m._buffers) if d or type(m) not in _PLAIN
        ]
        settings = [vars(module) for module in self._modules]
        self._sized: list[Any] = [*children, *owned, *settings, *map(vars, nested)]
        self._sizes = [*map(len, self._sized)]
        facts: list[tuple[Any, str]] = [(each, name) for each in (*children, *owned) for name in each]
        for module, own in zip(self._modules, settings, strict=True):
            if type(module) not in _PLAIN:
                facts += [(own, name) for name in own if name not in _BOOKKEEPING and name not in but]
        self._held, self._names = [held for held, _ in facts], [name for _, name in facts]
        self._objects = [*map(getitem, self._held, self._names)]
        self._functions = [(cls, name, getattr(cls, name)) for cls, name in dict.fromkeys(functions)]
        self._masks = [(mask, writes(mask), mask.detach().clone()) for mask in masks]

    def holds(self) -> bool:
        """Whether all of these objects are unchanged."""
        if (
            any(self._hooks)
            or [*map(type, self._modules)] != self._classes
            or [*map(len, self._sized)] != self._sizes
        ):
            return False
        try:
            same = all(map(is_, map(getitem, self._held, self._names), self._objects))
        except KeyError:
            return False
        return (
            same
            and all(getattr(cls, name) is function for cls, name, function in self._functions)
            and all(
                writes(mask) == before and (not read_at_once(mask) or torch.equal(mask, value))
                for mask, before, value in self._masks
            )
        )


def writes(tensor: Tensor) -> int:
    """The number of writes to the tensor that torch has counted; it counts none to an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


_remembered: WeakKeyDictionary[nn.ModuleList, tuple[Hashable, Evidence, Any]] = WeakKeyDictionary()


def recall(layers: nn.ModuleList, key: Hashable) -> Any | None:
    """The value remembered for these layers and this kind of input; None without one, or where it is outdated."""
    found = _remembered.get(layers)
    if found is None:
        return None
    kind, evidence, value = found
    return value if kind == key and evidence.holds() else None


def remember(layers: nn.ModuleList, couplings: Iterable[nn.Module], key: Hashable, value: Any) -> None:
    """Remember ``value``, which was read from these couplings among the layers, in place of any value before."""
    _remembered[layers] = key, Evidence([layers], couplings), value
