"""Whether a model is what its file would say: ``save`` refuses one that ``load`` would make into another."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from torch import nn

from .state import slots

__all__ = ["check_rebuilt", "is_foreign"]

_ADVICE = (
    "a file says how a model is constructed: undo what was changed since (parametrizations, pruning, spectral or "
    "weight norms, parts that were added or exchanged), or register a class that constructs it so"
)
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_BOOKKEEPING = {*vars(nn.Module()), "_compiled_call_impl", "_linfast_plan"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.layout, torch.memory_format, torch.device)


def check_rebuilt(model: nn.Module, built: nn.Module) -> None:
    """Raise where a model has other modules, tensors, settings or hooks than the one built from its description.

    Raises:
        TypeError: naming the module, and what to do.
    """
    for path, module in model.named_modules():
        what = f"{type(module).__name__}{f' at {path}' if path else ''}"
        for name, thing in _HOOKS.items():
            if found := vars(module).get(name):
                kinds = {type(hook).__name__ for hook in found.values()}
                raise TypeError(
                    f"cannot save {what}: it has {thing} ({', '.join(kinds)}), which no file holds; remove it"
                )
        for name in vars(module):
            if callable(getattr(type(module), name, None)):
                raise TypeError(f"cannot save {what}: it has a {name} of its own, which no file holds; remove it")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(f"cannot save {what}: it keeps an extra state; make it of parameters and buffers")
    mine, theirs = _parts(model), _parts(built) | _settings(built)
    mine |= {name: value for name, value in _settings(model).items() if name in theirs}  # others are notes
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise TypeError(
                f"cannot save a {type(model).__name__}: {name} is {mine.get(name, 'missing'):.200} and would be "
                f"{theirs.get(name, 'missing'):.200} in the loaded one; {_ADVICE}"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Of each module its class; of each tensor if it is trained."""
    classes = {path or "the model": f"a {type(module).__name__}" for path, module in model.named_modules()}
    return classes | {key: f"a {'parameter' if slot.trained else 'buffer'}" for key, slot in slots(model).items()}


def _settings(model: nn.Module) -> dict[str, str]:
    """What modules keep beside tensors and modules; of torch's and linfast's own what is not private."""
    return {
        f"{path}.{name}" if path else name: said
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _BOOKKEEPING and not (name.startswith("_") and not is_foreign(module))
        if name != "truncation_error" and (said := _said(value)) is not None
    }


def is_foreign(module: nn.Module) -> bool:
    """Whether its class is neither torch's nor linfast's."""
    return type(module).__module__.partition(".")[0] not in ("torch", "linfast")


def _said(value: Any) -> str | None:
    """A setting in words, the same for equal ones; None for what is none."""
    if isinstance(value, (tuple, list, dict)):
        items = [_said(item) for item in (value.items() if isinstance(value, dict) else value)]
        return None if None in items else f"{type(value).__name__}({', '.join(map(str, items))})"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.tolist()!r}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if value is None or isinstance(value, _PLAIN) else None
