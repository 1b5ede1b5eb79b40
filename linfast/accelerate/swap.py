"""Changes an object's class to one that runs an adapter's methods, and back.

The swapped class derives from the original, so isinstance, parameters, buffers, hooks and state_dict keys do not
change, and the object is the same object. It pickles as its original class, without its plan. A deep copy stays
swapped; a shallow copy has the original class.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from ..dispatch import has_global_hook
from ..flows.drift import DriftGuard
from ..rows import is_short
from .adapter import Adapter, Plan, Unfit
from .identity import PLAN, is_hooked, is_patched


class Swapped:
    """The first base class of every swapped class."""

    _linfast_original: type
    _linfast_adapter: Adapter

    def __init_subclass__(cls, **named: Any) -> None:
        """Keeps the original's ``__init_subclass__``, such as a registry's, from being called."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The object pickled as an instance of the original class."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, arguments, state, *rest = reduced
        arguments = tuple(self._linfast_original if a is type(self) else a for a in arguments)
        if build is copyreg.__newobj__:  # type: ignore[attr-defined]  # the pickler compares its class with ours
            build = object.__new__
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != PLAN}
        return (build, arguments, state, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        cls, plan = type(self), replace(plan_of(self), guard=DriftGuard())
        if "_linfast_original" in vars(cls):
            build, arguments, state, *_ = self.__reduce_ex__(4)
        else:  # a class derived by torch for a parametrization, which torch does not pickle
            build, arguments = object.__new__, (cls,)
            state = {key: value for key, value in vars(self).items() if key != PLAN}
        copied = build(*copy.deepcopy(arguments, memo))
        memo[id(self)] = copied
        state = copy.deepcopy(state, memo)
        copied.__setstate__(state) if hasattr(copied, "__setstate__") else copied.__dict__.update(state)
        if isinstance(copied, Swapped):
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
    cls: Any = swapped_class(adapter, original)
    vars(instance)[PLAN] = plan
    instance.__class__ = cls


def swap_back(instance: Any) -> None:
    """Give a swapped object its original class again."""
    instance.__class__ = instance._linfast_original
    del vars(instance)[PLAN]


def renew_plan(instance: Any) -> bool:
    """Plan again where a mask or a setting was changed. Returns whether the object is to run by its plan."""
    adapter, plan = instance._linfast_adapter, plan_of(instance)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the trace outlives later writes
        return adapter.masks is None and adapter.settings_of(instance, plan) == plan.settings
    try:
        if not adapter.holds(plan, instance):
            vars(instance)[PLAN] = adapter.plan_for(instance, plan.options)
    except Unfit:
        swap_back(instance)
        return False
    except RuntimeError:  # there are no values to read: on the meta device, or in an ensemble under vmap
        return all(mask.is_meta for mask in adapter.masks_of(instance, plan.layout))
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
    """The method that calls ``run``, or the original: for a coupling's short batch on a CPU, or after a change."""
    before = getattr(original, name)
    if adapter.decides:
        return functools.wraps(before)(run)
    order, accepted, fits = _arguments(before, run)

    @functools.wraps(before)
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        least = vars(self)[PLAN].least_rows[int(torch.is_grad_enabled())]  # Dynamo of torch 2.11 needs the int
        if least and arguments and is_short(arguments[0], least):
            return before(self, *arguments, **named)
        if not may_replace(self, adapter, name) or _is_symbolic((*arguments, *named.values())):
            return before(self, *arguments, **named)
        given = arguments
        for argument in order[len(given) :]:  # ``run`` may name them differently
            if argument not in named:
                break
            given += (named.pop(argument),)
        if len(given) not in fits or not (accepted is None or accepted.issuperset(named)):
            return before(self, *given, **named)
        return run(self, *given, **named)

    return method


def _arguments(
    before: Callable[..., Any], run: Callable[..., Any]
) -> tuple[tuple[str, ...], frozenset[str] | None, range]:
    """What a call of ``run`` may have; for any other the original is to raise its own error.

    Returns:
        The original's arguments after the instance, in order; those that ``run`` takes by keyword, None: any; how
        many ``run`` takes by position.
    """
    theirs, ours = ([*inspect.signature(f).parameters.values()] for f in (before, run))
    in_order = itertools.takewhile(lambda p: p.kind is p.POSITIONAL_OR_KEYWORD, theirs[1:])
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in ours)
    by_keyword = frozenset(p.name for p in ours if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    by_position = [p for p in ours[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    any_number = any(p.kind is p.VAR_POSITIONAL for p in ours)
    most = sys.maxsize if any_number else len(by_position) + 1
    fits = range(sum(p.default is p.empty for p in by_position), most)
    return tuple(p.name for p in in_order), None if any_keyword else by_keyword, fits


def _is_symbolic(arguments: Iterable[Any]) -> bool:
    """Whether torch.fx is tracing. It then records the library's own operations."""
    for argument in arguments:
        each = argument if isinstance(argument, (tuple, list)) else (argument,)
        if any(isinstance(a, torch.fx.Proxy) for a in each):
            return True
    return False


def may_replace(instance: Any, adapter: Adapter, method: str) -> bool:
    """Whether the adapter's ``method`` may run: the plan is valid, and it bypasses no hook and no patch.

    A hook that keeps a chain from being rebuilt in the backward is warned of once.
    """
    return plan_of(instance).fused is not None or is_unchanged(
        instance, adapter, method
    )  # Fused checks this itself


def is_unchanged(instance: Any, adapter: Adapter, method: str) -> bool:
    """``may_replace`` where the method does not run by a Fused."""
    if not renew_plan(instance) or is_patched(instance, but=method):
        return False
    if not adapter.chain and has_global_hook():
        return False
    hooked = next((module for module in adapter.inner(instance) if is_hooked(module)), None)
    if hooked is not None and adapter.chain and torch.is_grad_enabled():
        why = f"stored: its {type(hooked).__name__} has a hook or a method of its own"
        plan_of(instance).guard.say(why, f"{type(instance).__name__} was changed after accelerate; {why}")
    return hooked is None
