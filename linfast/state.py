"""A model's tensors by name, how they lie in memory and are shared, and which tensor of a file goes where.

Each module counts under its first name only: ``state_dict()`` follows a shared module once per path to it, which is
2^n times in a chain of n sums of a thing and itself.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .blueprint import DTYPES, is_described

Stored = Mapping[str, tuple[list[int], str]]  # shapes and dtypes of a file's tensors
_MOST_GAPS = 2  # each doubles the memory that a tensor takes


class Slot(NamedTuple):
    """A place that a module keeps a tensor in."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def trained(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


def _joined(path: str, name: str) -> str:
    """The name of a module's part."""
    return f"{path}.{name}" if path else name


def slots(model: nn.Module) -> dict[str, Slot]:
    """Each parameter and buffer, also those that state_dict() leaves out."""
    return {
        _joined(path, name): Slot(module, name, tensor)
        for path, module in model.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
    }


def unique(found: Mapping[str, Slot]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and for its other names the first one."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, (module, _, value) in found.items():
        _check_plain(key, module, value)
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if (other := first.setdefault(memory, key)) == key:
            tensors[key] = value.detach()
        else:
            aliases[key] = other
    _check_apart(found)
    return tensors, aliases


def _check_plain(key: str, module: nn.Module, value: Tensor) -> None:
    kind = type(module).__name__
    if torch.nn.parameter.is_lazy(value):
        raise ValueError(f"{key} of a {kind} has not been initialised; call the model once first")
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not plain or value.dtype not in DTYPES.values():
        what = f"{value.layout} tensor of {value.dtype}".removeprefix("torch.")
        raise TypeError(f"cannot save {key}, a {what} of a {kind}: files hold dense tensors of {', '.join(DTYPES)}")
    if value.is_meta:
        raise ValueError(f"{key} of a {kind} is on the meta device and has no values")


def _check_apart(found: Mapping[str, Slot]) -> None:
    """Raise where two parameters are views of one memory that overlap."""
    parameters = {id(slot.tensor): (key, slot.tensor) for key, slot in found.items() if slot.trained}
    ends: dict[int, tuple[int, str]] = {}  # by storage: up to which address it is taken, and by which parameter
    for key, value in sorted(parameters.values(), key=lambda item: item[1].data_ptr()):
        if not value.numel():
            continue
        last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        end = value.data_ptr() + (last + 1) * value.element_size()
        taken, other = ends.get(storage := value.untyped_storage().data_ptr(), (0, ""))
        if value.data_ptr() < taken:
            raise ValueError(
                f"{other} and {key} share memory and are two parameters: make them one, or clone one of them"
            )
        ends[storage] = end, key


def compact(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides of the same order in memory, with gaps where these have some, but narrow ones, and at most two.

    Whether a matrix has gaps decides how its products are computed and so how they round; their width does not.
    A dimension of stride 0 keeps it.
    """
    found, inner, size, gaps = [0] * len(shape), 1, 1, 0
    for d in sorted(range(len(shape)), key=lambda d: (strides[d], -d)):
        if strides[d] == 0 and shape[d] > 1:
            continue
        if strides[d] > inner and gaps < _MOST_GAPS:
            gaps, size = gaps + 1, 2 * size
        found[d] = size
        inner, size = max(inner, strides[d] * shape[d]), size * max(shape[d], 1)
    return found


def laid_out(value: Tensor, strides: Sequence[int], device: torch.device) -> Tensor:
    """A copy on this device, with ``compact`` strides like these."""
    steps = compact(value.shape, strides)
    room = torch.empty_strided(value.shape, steps, dtype=value.dtype, device=device)
    once = tuple(slice(None if step or n == 0 else 1) for n, step in zip(value.shape, steps, strict=True))
    room[once] = value[once]
    return room


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Further names of modules that the architecture does not describe, by their first names."""
    first = {id(module): path for path, module in model.named_modules()}
    return {
        name: first[id(child)]
        for path, module in model.named_modules()
        for part, child in module._modules.items()
        if child is not None and not is_described(child) and first[id(child)] != (name := _joined(path, part))
    }


def share_modules(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Put modules under their further names too, as ``shared_modules`` found them."""
    modules = dict(model.named_modules())
    for name, first in shared.items():
        path, _, part = name.rpartition(".")
        module, parent = modules[first], modules[path]
        old = parent._modules[part]
        if module is old:
            continue
        alike = old is not None and type(module) is type(old) and _shapes(module) == _shapes(old)
        if not alike or is_described(module) or any(inner is parent for inner in module.modules()):
            raise ValueError(f"{name} cannot be {first}")
        parent._modules[part] = module


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {key: slot.tensor.shape for key, slot in slots(module).items()}


def match(found: Mapping[str, Slot], given: set[int], stored: Stored, aliases: dict[str, str]) -> dict[str, str]:
    """For each slot of a model the tensor of the file that fills it, by ``aliases`` or its own name.

    ``given`` are ids of tensors whose dtype the architecture says.
    ValueError where tensors are missing, left over, or of another shape or kind of dtype.
    """
    filled = {**{name: name for name in stored}, **aliases}
    if found.keys() != filled.keys():
        missing, extra = sorted(found.keys() - filled.keys()), sorted(filled.keys() - found.keys())
        raise ValueError(f"missing tensors {missing[:9]}, left over {extra[:9]}")
    for slot, key in filled.items():
        (shape, dtype), built = stored[key], found[slot].tensor
        if tuple(shape) != tuple(built.shape):
            raise ValueError(f"{slot} is {tuple(shape)}, expected {tuple(built.shape)}")
        expected = str(built.dtype).removeprefix("torch.")
        any_floating = built.is_floating_point() and id(built) not in given
        if dtype != expected and not (any_floating and DTYPES[dtype].is_floating_point):
            raise ValueError(f"{slot} is {dtype}, expected {'floating point' if any_floating else expected}")
    return filled


def is_foreign(module: nn.Module) -> bool:
    """Whether its class is neither torch's nor linfast's."""
    return type(module).__module__.partition(".")[0] not in ("torch", "linfast")


# Whether a model is what its file would say

_ADVICE = (
    "a file says how a model is constructed: undo what was changed since (parametrizations, pruning, spectral or "
    "weight norms, parts that were added or exchanged), or register a class that constructs it so"
)
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_BOOKKEEPING = {*vars(nn.Module()), "_compiled_call_impl", "_linfast_plan", "truncation_error"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.layout, torch.memory_format, torch.device)


def check_rebuilt(model: nn.Module, built: nn.Module) -> None:
    """TypeError where a model has other modules, tensors, settings or hooks than ``built`` from its description."""
    for path, module in model.named_modules():
        what = f"cannot save {type(module).__name__}{f' at {path}' if path else ''}: it"
        for name, thing in _HOOKS.items():
            if found := vars(module).get(name):
                kinds = {type(hook).__name__ for hook in found.values()}
                raise TypeError(f"{what} has {thing} ({', '.join(kinds)}), which no file holds; remove it")
        for name in vars(module):
            if callable(getattr(type(module), name, None)):
                raise TypeError(f"{what} has a {name} of its own, which no file holds; remove it")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(f"{what} keeps an extra state; make it of parameters and buffers")
    mine, theirs = _parts(model), _parts(built) | dict(settings(built))
    mine |= {name: value for name, value in settings(model) if name in theirs}  # others are notes
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise TypeError(
                f"cannot save a {type(model).__name__}: {name} is {mine.get(name, 'missing'):.200} and would be "
                f"{theirs.get(name, 'missing'):.200} in the loaded one; {_ADVICE}"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Each module and its class, and each tensor and whether it is a parameter, in words."""
    kinds = {path or "the model": f"a {type(module).__name__}" for path, module in model.named_modules()}
    return kinds | {key: f"a {'parameter' if slot.trained else 'buffer'}" for key, slot in slots(model).items()}


def settings(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What modules keep beside tensors and modules; for torch's and linfast's own, what is not private."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            noted = name in _BOOKKEEPING or (name.startswith("_") and not is_foreign(module))
            if not noted and (said := _said(value)) is not None:
                yield _joined(path, name), said


def _said(value: Any) -> str | None:
    """A setting in words, the same for equal ones; None for what is no setting."""
    if isinstance(value, (tuple, list, dict)):
        items = [_said(item) for item in (value.items() if isinstance(value, dict) else value)]
        return None if None in items else f"{type(value).__name__}({', '.join(map(str, items))})"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.tolist()!r}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if value is None or isinstance(value, _PLAIN) else None
