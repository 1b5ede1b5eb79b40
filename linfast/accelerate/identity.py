"""Who a module is: its class as its library made it, and whether anyone has changed what it does.

No library is imported: a class is looked up in ``sys.modules`` where an instance of it must have come from.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "HOOKS",
    "PLAN",
    "changed_method",
    "defined_as",
    "find_class",
    "is_hooked",
    "is_patched",
    "is_sharded",
    "keywords",
    "original_class",
    "other_arguments",
    "positional",
    "uncompiled",
]

PLAN = "_linfast_plan"
"""The attribute of a swapped object that holds its Plan."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def original_class(module: object) -> type:
    """The module's class, or what it was before ``accelerate``."""
    return getattr(type(module), "_linfast_original", type(module))


def uncompiled(module: Any) -> Any:
    """What ``torch.compile`` made this module of, else the module."""
    compiled = "_orig_mod" in vars(module).get("_modules", ())
    return module._orig_mod if compiled else module


def find_class(module: str, name: str) -> type | None:
    """The class of this name in an imported module, else None."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def defined_as(module: object, where: str, name: str) -> bool:
    """Whether the module is an instance of exactly this class of this imported module."""
    return original_class(module) is find_class(where, name)


@functools.cache
def _methods(cls: type) -> tuple[str, ...]:
    """The names of the functions that a class has, but for those of every module or object."""
    own = (base for base in cls.__mro__ if base not in (nn.Module, object))
    kinds = FunctionType, staticmethod, classmethod
    return tuple({name: None for base in own for name, value in vars(base).items() if isinstance(value, kinds)})


# What torch.compiler.assume_constant_result does, which would import Dynamo with linfast.
_methods._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_patched(instance: object, but: str = "") -> bool:
    """Whether a method of its class, but for this one, was put on the instance, as another one calls it."""
    own = vars(instance)
    return any(name in own and name != but for name in _methods(original_class(instance)))


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: by hooks, or methods put on the instance."""
    return is_patched(module) or any(getattr(module, name) for name in HOOKS) or parametrize.is_parametrized(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of its own is another kind of tensor, such as a DTensor."""
    return any(p is not None and type(p.data) is not Tensor for p in module._parameters.values())


def positional(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what it takes in order, after the instance."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return tuple(p.name for p in itertools.takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD, parameters))


def keywords(method: Callable[..., Any]) -> frozenset[str] | None:
    """The names that it takes by keyword; None: all."""
    parameters = list(inspect.signature(method).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def other_arguments(method: Callable[..., Any], run: Callable[..., Any]) -> bool:
    """Whether a method takes what ``run``, which is to replace it, does not, or has other defaults."""
    theirs, ours = ([*inspect.signature(f).parameters.values()][1:] for f in (method, run))
    for parameter, mine in itertools.zip_longest(theirs, ours):
        if mine is not None and mine.kind is mine.VAR_POSITIONAL:
            return False
        if parameter is None:
            return bool(mine.default is mine.empty and mine.kind is not mine.VAR_KEYWORD)
        if mine is None or parameter.kind is not mine.kind:
            return True
        if repr(parameter.default).replace("[]", "()") != repr(mine.default):
            return True
        if parameter.default is not parameter.empty and parameter.name != mine.name:
            return True
    return False


def changed_method(instance: object, methods: Iterable[str]) -> str | None:
    """The first of these methods that is not what the instance's class or its library says, else None.

    A patched instance has it in its own dictionary; a patched class has a function there that was
    made under another name or in another module.
    """
    cls = original_class(instance)
    for name in methods:
        if name in vars(instance):
            return name
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)  # None: it has no such method
        function = vars(owner)[name] if owner is not None else None
        if owner is None or not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            return name
        if (function.__module__, function.__qualname__) != (owner.__module__, f"{owner.__qualname__}.{name}"):
            return name
    return None
