"""What samplers work on: a copy in eval mode of the caller's model, with the caller's tensors.

The caller's own modules are never switched to eval mode or given other tensors, not even for a moment: another
thread may be training them, or sampling from them, and whatever fails in between has nothing to put back.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from inspect import getclosurevars
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["check_initialised", "in_eval_mode", "working_copy"]

_Module = TypeVar("_Module", bound=nn.Module)


def working_copy(model: _Module, dtype: torch.dtype | None = None) -> _Module:
    """The model's structure copied and in eval mode, its tensors the model's own.

    Args:
        dtype: of the copy's floating-point tensors, where given; gradients reach the model's.

    Raises:
        ValueError: a part that cannot be copied, such as a lock, or a function that refers to a module by itself.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in _tensors(list(vars(module).values())):
            memo[id(tensor)] = tensor
        for tensor in _tensors((*module._parameters.values(), *module._buffers.values())):
            memo[id(tensor)] = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        kind = type(model).__name__
        raise ValueError(
            f"samplers work on a copy of the {kind}, in eval mode, and it has none ({error}): call f.eval() first"
        ) from error
    # Those in plain attributes are in the memo alone, what a TorchScript module consists of in modules() alone.
    hidden = [part for part in memo.values() if isinstance(part, nn.Module)]
    for module in dict.fromkeys((*copied.modules(), *hidden)):
        module.training = False
        for name, value in vars(module).items():
            if isinstance(value, types.FunctionType) and any(
                map(_is_modules, getclosurevars(value).nonlocals.values())
            ):
                raise ValueError(
                    f"{name} of a {type(module).__name__} is a function that refers to a module, and a copy of the "
                    "model in eval mode would call the original: call f.eval() first"
                )
    return copied


def _is_modules(value: object) -> bool:
    return isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)


def in_eval_mode(model: _Module) -> _Module:
    """The model itself where it is in eval mode with all its parts, else a ``working_copy``.

    Raises:
        ValueError: a part that cannot be copied, or that is not initialised.
    """
    check_initialised(model)
    return working_copy(model) if any(module.training for module in model.modules()) else model


def check_initialised(model: nn.Module) -> None:
    """ValueError where a part gets its tensors from its first call: a sampler's would change the caller's model."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ValueError(f"{name} ({type(module).__name__}) is not initialised: call the model once first")


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
