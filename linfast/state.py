"""A model's tensors by name, their memory layout and sharing, and the tensor of a file for each of them.

Each module is visited under its first name only: ``state_dict()`` would visit a shared module once per path to it,
which is 2^n times for A_n = A_{n-1} + A_{n-1}.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .blueprint import DTYPES, is_described
from .checks import with_article

Stored = Mapping[str, tuple[list[int], str]]  # shapes and dtypes of a file's tensors
_MOST_GAPS = 2  # in a tensor's strides; each doubles the memory that it takes


class Slot(NamedTuple):
    """A parameter or buffer: its module, its name in the module, and the tensor."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def trained(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)


def _joined(path: str, name: str) -> str:
    """The full name of the part ``name`` of the module at ``path``."""
    return f"{path}.{name}" if path else name


def slots(model: nn.Module) -> dict[str, Slot]:
    """Each parameter and buffer by its full name, also those that state_dict() leaves out."""
    return {
        _joined(path, name): Slot(module, name, tensor)
        for path, module in model.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
    }


def unique(found: Mapping[str, Slot]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, aliases): each tensor once, by its first name, and for each further name the first name."""
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
    """ValueError where two parameters overlap in memory."""
    parameters = {id(slot.tensor): (key, slot.tensor) for key, slot in found.items() if slot.trained}
    ends: dict[int, tuple[int, str]] = {}  # by storage: the end of the last parameter in it, and its name
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
    """Strides with the same memory order, in which at most two gaps remain, each shortened to the size before it.

    Whether a matrix has gaps between its rows decides how the BLAS computes and rounds its products; the width of
    the gaps does not. A stride of 0 stays 0.
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
    """A copy of the value on this device, with strides ``compact(value.shape, strides)``."""
    steps = compact(value.shape, strides)
    room = torch.empty_strided(value.shape, steps, dtype=value.dtype, device=device)
    once = tuple(slice(None if step or n == 0 else 1) for n, step in zip(value.shape, steps, strict=True))
    room[once] = value[once]
    return room


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Further name -> first name, for shared modules that the architecture does not describe."""
    first = {id(module): path for path, module in model.named_modules()}
    return {
        name: first[id(child)]
        for path, module in model.named_modules()
        for part, child in module._modules.items()
        if child is not None and not is_described(child) and first[id(child)] != (name := _joined(path, part))
    }


def share_modules(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Restore the sharing that ``shared_modules`` found; ValueError where two modules cannot be the same."""
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
    """Slot name -> name of the file's tensor that fills the slot: the same name, or the one in ``aliases``.

    ``given``: ids of tensors whose exact dtype the architecture states; others may be stored in any floating dtype.
    ValueError where tensors are missing, left over, or of another shape or dtype.
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
    """Whether the module's class is neither torch's nor linfast's."""
    return type(module).__module__.partition(".")[0] not in ("torch", "linfast")


# Whether a model equals the model that its file would rebuild

_ADVICE = (
    "a file says how a model is constructed: undo what was changed since (parametrizations, pruning, spectral or "
    "weight norms, parts that were added or exchanged), or register a class that constructs it so"
)
_HOOKS = {"_forward_hooks": "a forward hook", "_forward_pre_hooks": "a forward pre-hook"}
_BOOKKEEPING = {*vars(nn.Module()), "_compiled_call_impl", "_linfast_plan", "truncation_error"}
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.layout, torch.memory_format, torch.device)


def check_rebuilt(model: nn.Module, built: nn.Module) -> None:
    """TypeError where ``model`` and ``built``, rebuilt from its description, differ in more than values."""
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
    mine |= {name: value for name, value in settings(model) if name in theirs}  # other attributes are ignored
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise TypeError(
                f"cannot save {with_article(type(model))}: {name} is {mine.get(name, 'missing'):.200} and would be "
                f"{theirs.get(name, 'missing'):.200} in the loaded one; {_ADVICE}"
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """By full name, the class of each module, and whether each tensor is a parameter or a buffer, in words."""
    kinds = {path or "the model": f"a {type(module).__name__}" for path, module in model.named_modules()}
    return kinds | {key: f"a {'parameter' if slot.trained else 'buffer'}" for key, slot in slots(model).items()}


def settings(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, value in words) of the modules' other attributes; of torch's and linfast's, the public ones only."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            noted = name in _BOOKKEEPING or (name.startswith("_") and not is_foreign(module))
            if not noted and (said := _said(value)) is not None:
                yield _joined(path, name), said


def _said(value: Any) -> str | None:
    """A setting in words, equal words for equal settings; None for a value that is not a setting."""
    if isinstance(value, (tuple, list, dict)):
        items = [_said(item) for item in (value.items() if isinstance(value, dict) else value)]
        return None if None in items else f"{type(value).__name__}({', '.join(map(str, items))})"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {value.tolist()!r}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if value is None or isinstance(value, _PLAIN) else None
