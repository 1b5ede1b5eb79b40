"""Who a module is: its class as its library made it, and whether anyone has changed what it does.

No library is imported: a class is looked up in ``sys.modules`` where an instance of it must have come from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FunctionType

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "HOOKS",
    "PLAN",
    "changed_method",
    "defined_as",
    "find_class",
    "is_hooked",
    "is_sharded",
    "original_class",
]

PLAN = "_linfast_plan"
"""The attribute of a swapped object that holds its Plan."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def original_class(module: object) -> type:
    """The module's class, or what it was before ``accelerate``."""
    return getattr(type(module), "_linfast_original", type(module))


def find_class(module: str, name: str) -> type | None:
    """The class of this name in an imported module, else None."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def defined_as(module: object, where: str, name: str) -> bool:
    """Whether the module is an instance of exactly this class of this imported module."""
    return original_class(module) is find_class(where, name)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any(getattr(module, name) for name in HOOKS) or parametrize.is_parametrized(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of its own is another kind of tensor, such as a DTensor."""
    return any(p is not None and type(p.data) is not Tensor for p in module._parameters.values())


def changed_method(instance: object, methods: Iterable[str]) -> str | None:
    """The first of these methods that is not what the instance's class or its library says, else None.

    A patched instance has it in its own dictionary; a patched class has a function there that was
    made under another name or in another module.
    """
    cls = original_class(instance)
    for name in methods:
        if name in vars(instance):
            return name
        owner = next((base for base in cls.__mro__ if name in vars(base)), None)
        function = vars(owner)[name] if owner is not None else None
        if owner is None or not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            return name
        if (function.__module__, function.__qualname__) != (owner.__module__, f"{owner.__qualname__}.{name}"):
            return name
    return None
