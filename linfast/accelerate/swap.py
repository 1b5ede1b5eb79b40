"""Swapping an object's class for one that runs an adapter's methods, and back.

The swapped class derives from the original, so that isinstance, parameters, buffers, hooks
and state_dict keys are what they were; the object is the same object. It pickles as its
original class, without its plan. A deep copy stays swapped; a shallow copy is the original.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..flows.drift import DriftGuard
from .adapter import Adapter, Plan, Unfit
from .identity import PLAN, is_hooked, is_patched, keywords, positional

__all__ = ["Swapped", "plan_of", "swap", "swap_back", "swapped_class"]


class Swapped:
    """Mixed into every swapped class."""

    _linfast_original: type
    _linfast_adapter: Adapter

    def __init_subclass__(cls, **named: Any) -> None:
        """The original's own, such as a registry's, is not called for ours."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an instance of the original class."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, arguments, state, *rest = reduced
        arguments = tuple(self._linfast_original if a is type(self) else a for a in arguments)
        if build is copyreg.__newobj__:  # type: ignore[attr-defined]  # whose class the pickler compares with ours
            build, arguments = copyreg._reconstructor, (*arguments, object, None)  # type: ignore[attr-defined]
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != PLAN}
        return (build, arguments, state, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        cls, plan = type(self), replace(plan_of(self), guard=DriftGuard())
        parametrized = "_linfast_original" not in vars(
            cls
        )  # since: a class derived from ours, which torch does not pickle
        if parametrized:
            build, arguments = object.__new__, (cls,)
            state = {key: value for key, value in vars(self).items() if key != PLAN}
        else:
            build, arguments, state, *_ = self.__reduce_ex__(4)
        copied = build(*copy.deepcopy(arguments, memo))
        memo[id(self)] = copied
        state = copy.deepcopy(state, memo)
        copied.__setstate__(state) if hasattr(copied, "__setstate__") else copied.__dict__.update(state)
        if parametrized:
            vars(copied)[PLAN] = plan
        else:
            swap(copied, self._linfast_adapter, plan)
        renew_plan(copied)
        return copied

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)  # type: ignore[misc]
        renew_plan(self)


def plan_of(instance: Any) -> Plan:
    return vars(instance)[PLAN]


def swap(instance: Any, adapter: Adapter, plan: Plan) -> None:
    """Make this object, of the adapter's class, run the adapter's methods."""
    original: Any = type(instance)
    cls = swapped_class(adapter, original)
    vars(instance)[PLAN] = plan
    instance.__class__ = cls


def swap_back(instance: Any) -> None:
    """Make this object what it was."""
    instance.__class__ = instance._linfast_original
    del vars(instance)[PLAN]


def renew_plan(instance: Any) -> bool:
    """Plan anew where a mask or the like was written to or replaced; whether the object is to run by its plan."""
    adapter, plan = instance._linfast_adapter, plan_of(instance)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # what is made now serves whatever is written later
        return adapter.masks is None and adapter.settings_of(instance) == plan.settings
    try:
        if not adapter.holds(plan, instance):
            vars(instance)[PLAN] = adapter.plan_for(instance, plan.options)
    except Unfit:
        swap_back(instance)
        return False
    except RuntimeError:  # no values to be read: on the meta device, where any do, or in an ensemble under vmap
        return adapter.masks is None or all(mask.is_meta for mask in adapter.masks(instance))
    return True


@functools.cache
def swapped_class(adapter: Adapter, original: type) -> type:
    """The class that derives from the original and runs the adapter's methods."""
    body: dict[str, Any] = {name: _method(name, run, adapter, original) for name, run in adapter.methods.items()}
    body |= {"_linfast_original": original, "_linfast_adapter": adapter}
    body |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    bases = (Swapped, original)
    return types.new_class(original.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _method(name: str, run: Callable[..., Any], adapter: Adapter, original: type) -> Callable[..., Any]:
    """``run``, or the original where a hook or a patch that ``run`` would pass by is to be heeded."""
    before = getattr(original, name)
    order, accepted = positional(before), keywords(run)

    @functools.wraps(before)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        if not renew_plan(self):
            return before(self, *arguments, **named)
        if _is_changed(self, adapter, name) or _is_symbolic((*arguments, *named.values())):
            return before(self, *arguments, **named)
        for given in order[len(arguments) :]:  # ``run`` has other names for them
            if given not in named:
                break
            arguments += (named.pop(given),)
        for given in named:
            if accepted is not None and given not in accepted:
                return before(self, *arguments, **named)
        return run(self, *arguments, **named)

    return method


def _is_symbolic(arguments: Iterable[Any]) -> bool:
    """Whether torch.fx is tracing: then it is to see the library's own operations."""
    given = (
        a for argument in arguments for a in (argument if isinstance(argument, (tuple, list)) else (argument,))
    )
    return any(isinstance(a, torch.fx.Proxy) for a in given)


def _is_changed(instance: Any, adapter: Adapter, method: str) -> bool:
    """Whether there is a hook or a patch that the adapter's ``method`` would pass by.

    Where it keeps a chain from being rebuilt in a backward, that is said once.
    """
    if is_patched(instance, but=method) or (not adapter.chain and nn.modules.module._has_any_global_hook()):
        return True
    for module in adapter.inner(instance):
        if is_hooked(module):
            plan = plan_of(instance)
            if adapter.chain and plan.options.memory == "invert" and torch.is_grad_enabled():
                why = f"stored: its {type(module).__name__} has a hook or a method of its own"
                plan.guard.say(why, f"{type(instance).__name__} was changed after accelerate; {why}")
            return True
    return False
