"""OwnState: what an instance's code may read outside its networks, and whether any of it has changed since.

    attributes    of the instance and of its submodules outside the networks: the same objects or plain values
    containers    lists, tuples, sets, dicts and objects among them, at any depth: their items in the same way
    tensors       buffers, frozen parameters and tensors among all these: the number of writes; on a CPU the values
    classes       the functions and attributes of the modules' classes

What a function closes over, globals, and parameters that require a gradient are not part of it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable
from enum import Enum
from operator import getitem, is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.remembered import Evidence
from .adapter import Unfit
from .formula import PLAIN
from .identity import PLAN, original_class

_KEPT_BY_TORCH = frozenset(vars(nn.Module())) | {PLAN}
_LEAVES = (
    *PLAIN, complex, bytes, range, slice, type, FunctionType, BuiltinFunctionType, ModuleType, functools.partial,
    Enum, torch.dtype, torch.device, torch.memory_format, property, staticmethod, classmethod,
)  # fmt: skip
_SERIES = (list, tuple, set, frozenset, deque)


class OwnState:
    """The state of a module outside these networks, as it is now.

    Attributes:
        trained: whether a parameter outside the networks requires a gradient.
        constant: whether all of it is plain values and functions that are attributes of the module or its class.

    Raises:
        Unfit: an attribute's later changes could not be seen, or it requires a gradient and is no parameter.
    """

    def __init__(self, module: nn.Module, nets: Iterable[nn.Module]) -> None:
        inside = {id(m) for net in nets for m in net.modules()}
        outside = [m for m in module.modules() if id(m) not in inside]
        if any(isinstance(m, torch.jit.ScriptModule) for m in outside):
            raise Unfit("it has a submodule of torch.jit outside its networks, whose attributes cannot be compared")
        self._modules = {id(m) for m in module.modules()}
        self._parameters = {id(p) for p in module.parameters()}
        self.constant = True
        self._seen: dict[int, Any] = {}
        self._tensors: list[Tensor] = []
        self._held: list[Any] = []
        self._names: list[Any] = []
        self._values: list[Any] = []
        self._sized: list[Any] = []
        self._series: list[tuple[Any, list[Any]]] = []
        for m in outside:
            for owned in (vars(m), m._parameters, m._buffers, m._modules):
                self._add(owned, m is module or owned is not vars(m))
            for cls in original_class(m).__mro__:
                if cls is not object and cls.__module__.partition(".")[0] != "torch":
                    self._add(vars(cls), True, must=False)
        self._required = [(p, p.requires_grad) for m in outside for p in m._parameters.values() if p is not None]
        self.trained = any(required for _, required in self._required)
        self._evidence = Evidence((), (), (), [t for t in self._tensors if not t.requires_grad])
        self._sizes = [*map(len, self._sized)]

    def _add(self, owned: Any, plain: bool, must: bool = True) -> None:
        """Take in a dict of attributes; ``must``: refuse those whose changes could not be seen."""
        names = [name for name in owned if name not in _KEPT_BY_TORCH]
        self._sized.append(owned)
        self._held += [owned] * len(names)
        self._names += names
        self._values += [owned[name] for name in names]
        self.constant &= plain or not names
        for name in names:
            if must or not str(name).startswith("__"):
                self._descend(owned[name], str(name), must)

    def _descend(self, value: Any, name: str, must: bool) -> None:
        if isinstance(value, _LEAVES) or id(value) in self._modules or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if value.requires_grad and id(value) not in self._parameters:
                raise Unfit(f"its {name} requires a gradient and is neither a parameter nor in a network")
            self._tensors.append(value)
            self.constant &= id(value) in self._parameters and value.requires_grad
        elif isinstance(value, dict):
            self._add(value, False, must)
        elif isinstance(value, _SERIES):
            self._series.append((value, [*value]))
            self.constant = False
            for item in value:
                self._descend(item, name, must)
        elif isinstance(value, MethodType):
            self._descend(value.__self__, name, must)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not _has_slots(value):
            self._add(vars(value), False, must)
        elif must and (isinstance(value, nn.Module) or not callable(value)):
            raise Unfit(f"changes of its {name}, a {type(value).__name__}, could not be seen")

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        if [*map(len, self._sized)] != self._sizes:
            return False
        try:
            if not all(map(is_, map(getitem, self._held, self._names), self._values)) and not _same(
                map(getitem, self._held, self._names), self._values
            ):
                return False
        except KeyError:
            return False
        return (
            all(len(series) == len(items) and _same(series, items) for series, items in self._series)
            and all(tensor.requires_grad is before for tensor, before in self._required)
            and (not self._tensors or self._evidence.holds())
        )


def _has_slots(value: Any) -> bool:
    return any(vars(cls).get("__slots__") for cls in type(value).__mro__)


def _same(now: Iterable[Any], before: Iterable[Any]) -> bool:
    """Whether these are the same objects, or equal plain values of one type."""
    pairs = zip(now, before, strict=True)
    return all(a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b) for a, b in pairs)
