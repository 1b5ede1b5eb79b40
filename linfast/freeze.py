"""freeze: weights derived from weights (inverses, folded maps) are kept while a model is frozen.

Outside a freeze they are computed at every call, in the graph: no key can tell whether a weight
has changed (writes through ``.data`` and fused optimisers leave its ``_version`` as it was).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

_Value = TypeVar("_Value")
Kept = dict[tuple[nn.Module, Hashable], Any]


class Frozen:
    """The modules of one promise and what was derived from them: as ``freeze`` while it is entered.

    What was derived lives as long as this object, and serves the next time that it is entered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = set(model.modules())
        self.values: Kept = {}

    def __enter__(self) -> None:
        _active.append(self)

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)


class _Thread(threading.local):
    """The promises that this thread passes by: those from before its block of ``thawed``."""

    thawed: tuple[Frozen, ...] = ()


# The process's, as the promise is; outermost first, so that a nested freeze adds nothing. Other threads write to
# it: it is read by a copy.
_active: list[Frozen] = []
_thread = _Thread()


@contextlib.contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Inside the block, each derived weight of ``model`` is computed at most once.

    The caller promises that inside the block no parameter or buffer of ``model`` changes or moves, and no layer or
    hook is put in or taken out; an ActNorm that waits for its first batch goes on waiting. What a gradient is
    wanted of is computed at every call all the same: gradients stay right, and only ``torch.no_grad()`` or
    parameters that do not require a gradient are faster. What torch.compile, torch.export or a torch.func transform
    traces is computed at every call too. Blocks nest; what is kept is let go at the end, also after an exception.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    with Frozen(model):
        yield


@contextlib.contextmanager
def thawed() -> Iterator[None]:
    """In this thread the block is outside what was frozen before: what is made in it sees weights that change."""
    before, _thread.thawed = _thread.thawed, tuple(_active)
    try:
        yield
    finally:
        _thread.thawed = before


def derived(module: nn.Module, key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """``compute()``; kept under ``key`` while ``module`` is frozen, unless it is None; outside autograd where kept.

    ``compute`` depends on nothing but ``key`` and the parameters and buffers of ``module``, its
    children's among them.
    """
    values = kept_values(module)
    return compute() if values is None else kept(values, module, key, compute)


def kept(values: Kept, module: nn.Module, key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """``derived`` where ``kept_values(module)`` is not None."""
    value = values.get((module, key))
    if value is None:
        with torch.inference_mode(False), torch.no_grad():
            value = values[module, key] = compute()
    return value


def is_frozen(module: nn.Module) -> bool:
    """Whether the module's parameters and buffers are frozen; in traced code, whether any module's are."""
    if torch.compiler.is_compiling():
        return len(_active) > 0
    return any(module in frozen.modules for frozen in _active[:])


def kept_values(module: nn.Module) -> Kept | None:
    """Where what is computed of this module is kept now; None where it is computed at every call."""
    if torch.compiler.is_compiling() or not _active:
        return None
    for frozen in _active[:]:
        if module in frozen.modules and frozen not in _thread.thawed:
            return None if _traced(module) else frozen.values
    return None


def _traced(module: nn.Module) -> bool:
    """Whether a gradient flows to the module's parameters, or a torch.func transform runs."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # its tensors must not outlive it
        return True
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
