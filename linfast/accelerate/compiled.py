"""compile=True: conditioners compiled one by one, each kind once.

Dynamo keeps what it compiles with the code of the function it was called through, a few versions of each
(``torch._dynamo.config.recompile_limit``), and runs the rest eagerly: modules of all kinds that share a forward
share that number. Here every kind of module is called through functions of its own, for each mode and sample
shape: blocks that are alike share what is compiled, and others do not displace it. So the batch is the only
size that changes under one function; Inductor fails on some graphs whose images' sides are unknown too.
What it fails on all the same runs uncompiled, with one warning.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .swap import Swapped
from .verify import code_of

__all__ = ["compile_conditioners", "uncompile"]

_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The modules that were compiled here and not by the caller."""


def compile_conditioners(instance: Any) -> None:
    """Compile the conditioners of a swapped object, and what else its adapter says is worth it."""
    adapter = instance._linfast_adapter
    for module in (*adapter.conditioners(instance), *adapter.compiles(instance)):
        apart = any(isinstance(m, Swapped) for m in module.modules() if m is not module)
        if module._compiled_call_impl is None and not apart:  # else its parts are compiled
            module._compiled_call_impl = functools.partial(_region_of(code_of(module)), module)
            _COMPILED.add(module)


def uncompile(module: nn.Module) -> None:
    """Undo ``compile_conditioners``."""
    if module in _COMPILED:
        module._compiled_call_impl = None
        _COMPILED.discard(module)


class _Region:
    """The compiled call of all modules of one kind."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
        shapes = [a.shape[1:] for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
        mode = torch.is_grad_enabled(), module.training, *shapes
        if mode not in self._calls:
            self._calls[mode] = torch.compile(_own_call())
        try:
            return self._calls[mode](module, *arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._calls[mode] = _call
            name, why = type(module).__name__, str(error).partition("\n")[0]
            warnings.warn(f"{name} runs uncompiled: {type(error).__name__}: {why}", RuntimeWarning, stacklevel=2)
            return _call(module, *arguments, **named)


def _call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
    return module._call_impl(*arguments, **named)


def _own_call() -> Callable[..., Any]:
    """Another ``_call``: the object holds what is compiled, the name what Dynamo has learned of sizes."""
    name = f"{_call.__name__}_{next(_numbers)}"
    return FunctionType(_call.__code__.replace(co_name=name), globals(), name)


_numbers = itertools.count()


@functools.cache
def _region_of(kind: Hashable) -> _Region:
    return _Region()
