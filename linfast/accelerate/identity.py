"""Whether a module is of a known class, and whether hooks, patches or parametrizations change what it computes.

No library is imported: a class is looked up in ``sys.modules``, which contains its module if an instance exists.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..flows.remembered import HOOKS

PLAN = "_linfast_plan"
"""The attribute of a swapped object that holds its Plan."""


def original_class(module: object) -> type:
    """The module's class; of a swapped module, its class before ``accelerate``."""
    return getattr(type(module), "_linfast_original", type(module))


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    wrapped = "_orig_mod" in vars(module).get("_modules", ())  # a ScriptModule's has no ``get``
    return module._orig_mod if wrapped else module


def modules_of(instance: Any) -> dict[str, nn.Module]:
    """{path: module}: the module itself, or the modules among the attributes of an object that is not a module."""
    if isinstance(instance, nn.Module):
        return {"": instance}
    return {name: value for name, value in vars(instance).items() if isinstance(value, nn.Module)}


def find_class(module: str, name: str) -> type | None:
    """The class of this name in an imported module, else None."""
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def defined_as(module: object, where: str, name: str) -> bool:
    """Whether the module is an instance of exactly this class of this imported module."""
    return original_class(module) is find_class(where, name)


def has(instance: object, names: Iterable[str]) -> bool:
    """Whether it has all these attributes. A property that raises counts: the error is raised where it is read."""

    def is_there(name: str) -> bool:
        try:
            return hasattr(instance, name)
        except Exception:
            return True

    return all(map(is_there, names))


def is_patched(instance: object, but: str = "") -> bool:
    """Whether an attribute of the instance shadows a method of its class other than ``but``."""
    cls = original_class(instance)
    for name in vars(instance):
        found = getattr(cls, name, None)
        if (
            isinstance(found, (FunctionType, MethodType))
            and name != but
            and found is not getattr(nn.Module, name, None)
        ):
            return True
    return False


def is_hooked(module: nn.Module) -> bool:
    """Whether a call runs more than the class's methods: a hook, a parametrization, a method on the instance."""
    return is_patched(module) or any(getattr(module, name) for name in HOOKS) or parametrize.is_parametrized(module)


def without_hooks() -> dict[str, Any]:
    """The attributes that hold a module's hooks, all of them empty."""
    return {name: value for name, value in vars(nn.Module()).items() if "hook" in name}


def is_sharded(module: nn.Module) -> bool:
    """Whether one of its own parameters is of another tensor class, such as DTensor."""
    return any(type(p.data) is not Tensor for p in module.parameters(recurse=False))


def other_arguments(method: Callable[..., Any], run: Callable[..., Any]) -> bool:
    """Whether a method takes arguments that ``run``, its replacement, does not take, or has other defaults."""
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


def is_own_method(cls: type, name: str) -> bool:
    """Whether the method is still the function that the source of the class, or of a base class, defines."""
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    function = None if owner is None else vars(owner)[name]
    function = function.fget if isinstance(function, property) else function
    if owner is None or not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    return (function.__module__, function.__qualname__) == (owner.__module__, f"{owner.__qualname__}.{name}")


@functools.lru_cache(256)
def _are_own(cls: type, names: tuple[str, ...], functions: tuple[Any, ...]) -> bool:
    return all(is_own_method(cls, name) for name in names)


def has_own(cls: type, names: tuple[str, ...]) -> bool:
    """Whether these methods of the class are its source's; found again only where one of them was replaced."""
    return _are_own(cls, names, tuple([getattr(cls, name, None) for name in names]))


def changed_method(instance: object, methods: Iterable[str]) -> str | None:
    """The first of these methods that was replaced on the instance or on its class, else None."""
    cls = original_class(instance)
    return next((name for name in methods if name in vars(instance) or not is_own_method(cls, name)), None)
