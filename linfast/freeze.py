"""freeze: weights derived from weights (inverses, folded maps) are kept while a model is frozen.

Outside ``freeze`` they are computed at every call, with gradients: no key could tell whether a weight
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
    """A model's modules and the values derived from their weights. ``with Frozen(model)`` is as ``freeze(model)``.

    The derived values live as long as this object, and are used again when it is entered again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = set(model.modules())
        self.values: Kept = {}

    def __enter__(self) -> None:
        _active.append(self)

    def __exit__(self, *exception: object) -> None:
        _active.remove(self)


class _Thread(threading.local):
    """``thawed``: the frozen models that this thread ignores, from before it entered its ``thawed`` block."""

    thawed: tuple[Frozen, ...] = ()


# Shared by all threads, as ``freeze`` is. The outermost comes first, so that a nested freeze uses its values. Loops
# run over a copy, because other threads may change the list.
_active: list[Frozen] = []
_thread = _Thread()


@contextlib.contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Inside the block, each derived weight of ``model`` is computed at most once.

    The caller promises that inside the block no parameter or buffer of ``model`` changes or moves, and no layer or
    hook is added or removed; an ActNorm is not initialised inside the block. A derived weight whose gradient is
    required is still computed at every call: gradients are right, and only calls under ``torch.no_grad()`` or with
    parameters that require no gradient become faster. It is also computed at every call that torch.compile,
    torch.export or torch.func traces. Blocks nest; derived weights are freed at the end, also after an exception.

    Raises:
        TypeError: model is not a module.

    Examples:
        >>> g = lf.coupling_flow(features=8)
        >>> with torch.no_grad(), lf.freeze(g):
        ...     batches = [g.inverse(torch.randn(5, 8)) for _ in range(3)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    with Frozen(model):
        yield


@contextlib.contextmanager
def thawed() -> Iterator[None]:
    """In this block, this thread ignores earlier ``freeze`` blocks: derived weights follow changes of weights."""
    before, _thread.thawed = _thread.thawed, tuple(_active)
    try:
        yield
    finally:
        _thread.thawed = before


def derived(module: nn.Module, key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """``compute()``. While ``module`` is frozen, the result is cached under ``key``, without a graph, unless None.

    ``compute`` may depend only on ``key`` and on the parameters and buffers of ``module`` and its children.
    """
    values = kept_values(module)
    return compute() if values is None else kept(values, module, key, compute)


def kept(values: Kept, module: nn.Module, key: Hashable, compute: Callable[[], _Value]) -> _Value:
    """The value of ``module`` and ``key`` in ``values``, from ``kept_values``; computed and stored if missing."""
    value = values.get((module, key))
    if value is None:
        with torch.inference_mode(False), torch.no_grad():
            value = values[module, key] = compute()
    return value


def is_frozen(module: nn.Module) -> bool:
    """Whether the module's parameters and buffers are frozen; under torch.compile, whether any module's are."""
    if torch.compiler.is_compiling():
        return len(_active) > 0
    return any(module in frozen.modules for frozen in _active[:])


def kept_values(module: nn.Module) -> Kept | None:
    """The cache of values derived from this module; None where they must be computed at every call."""
    if torch.compiler.is_compiling() or not _active:
        return None
    for frozen in _active[:]:
        if module in frozen.modules and frozen not in _thread.thawed:
            return None if _traced(module) else frozen.values
    return None


def _traced(module: nn.Module) -> bool:
    """Whether a gradient flows to the module's parameters, or a torch.func transform runs."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # tensors must not outlive their transform
        return True
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
