"""The tensors of a model by name, each module under its first name only, and how they lie in memory and are shared.

``state_dict()`` follows a shared module once a path, 2^n of them in a chain of n sums of a thing and itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architecture import DTYPES, is_described
from .blueprint import Blueprint, size_list

__all__ = [
    "Slot",
    "gaps",
    "joined",
    "laid_out",
    "match",
    "memory_order",
    "narrowed",
    "share_modules",
    "shared_modules",
    "slots",
    "unique",
]


_MOST_GAPS = 2  # each doubles the memory that a tensor takes


class Slot(NamedTuple):
    """A place that a module keeps a tensor in."""

    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def trained(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)

    def put(self, value: Tensor) -> None:
        setattr(self.module, self.name, value)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Each parameter and buffer, those that state_dict() leaves out among them."""
    return {
        f"{path}.{name}" if path else name: Slot(module, name, tensor)
        for path, module in model.named_modules()
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
    }


def unique(found: Mapping[str, Slot]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and the first names of those that are kept under others too.

    Raises:
        TypeError: a tensor that is no plain dense one of real numbers.
        ValueError: parameters that share memory and are not one parameter.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for key, (module, _, value) in found.items():
        _check_plain(key, module, value)
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
        if (other := first.setdefault(memory, key)) == key:
            tensors[key] = value.detach()
            continue
        aliases[key] = other
        if found[key].trained and found[other].trained and value is not found[other].tensor:
            raise ValueError(_SHARED.format(key, other))
    _check_apart({key: value for key, value in tensors.items() if found[key].trained})
    return tensors, aliases


_SHARED = "{} and {} share memory and are two parameters: make them one, or clone one of them"


def _check_plain(key: str, module: nn.Module, value: Tensor) -> None:
    kind = type(module).__name__
    if torch.nn.parameter.is_lazy(value):
        raise ValueError(f"{key} of a {kind} has not been initialised; call the model once first")
    if (
        type(value) not in (Tensor, nn.Parameter)
        or value.layout != torch.strided
        or value.dtype not in DTYPES.values()
    ):
        what = f"{value.layout} tensor of {value.dtype}".removeprefix("torch.")
        raise TypeError(f"cannot save {key}, a {what} of a {kind}: files hold dense tensors of {', '.join(DTYPES)}")
    if value.is_meta:
        raise ValueError(f"{key} of a {kind} is on the meta device and has no values")


def _check_apart(parameters: Mapping[str, Tensor]) -> None:
    """Raise where two parameters are overlapping views of one memory."""
    views: dict[tuple[int, torch.dtype], list[str]] = {}
    for key, value in parameters.items():
        if value.numel():
            views.setdefault((value.untyped_storage().data_ptr(), value.dtype), []).append(key)
    for keys in views.values():
        size = max(narrowed(parameters[key]).storage_offset() + _span(parameters[key]) for key in keys)
        owner = torch.full((size if len(keys) > 1 else 0,), -1)
        for i, key in enumerate(keys if len(keys) > 1 else ()):
            view = narrowed(parameters[key])
            taken = owner.as_strided(view.shape, view.stride(), view.storage_offset())
            if (other := int(taken.max())) >= 0:
                raise ValueError(_SHARED.format(key, keys[other]))
            taken.fill_(i)


def _span(value: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))


def narrowed(value: Tensor) -> Tensor:
    """Without the repetitions of an expanded tensor: one row along each dimension that repeats one."""
    return value[
        tuple(slice(None if stride or not n else 1) for n, stride in zip(value.shape, value.stride(), strict=True))
    ]


def memory_order(value: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the innermost last."""
    return sorted(range(value.ndim), key=lambda d: -value.stride()[d])


def gaps(value: Tensor) -> list[int]:
    """The dimensions between whose entries there is other memory, two at most."""
    found, inner = list[int](), 1
    for d in reversed([] if value.is_contiguous() else memory_order(value)):
        if value.stride(d) > inner and len(found) < _MOST_GAPS:
            found.append(d)
        inner = max(inner, value.stride(d) * value.shape[d])
    return found


def laid_out(value: Tensor, order: list[int], apart: Collection[int] = ()) -> Tensor:
    """A copy with its dimensions in this order in memory, and as much memory again between the entries of some.

    Whether a matrix has gaps decides how its products are computed, and so how they round; their width does not.
    """
    if sorted(size_list(order)) != list(range(value.ndim)):
        raise IndexError(f"{order} is no order of the dimensions of {tuple(value.shape)}")
    if len(apart) > _MOST_GAPS or not set(apart) <= set(order):
        raise IndexError(f"{apart} are no {_MOST_GAPS} dimensions of {tuple(value.shape)}")
    back = sorted(range(value.ndim), key=order.__getitem__)
    room = value.new_zeros([size for d in order for size in (value.shape[d], 1 + (d in apart))])
    return room[(slice(None), 0) * value.ndim].copy_(value.permute(order)).permute(back)


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Second names of modules that the architecture does not describe, so does not share, by their first ones."""
    first = {id(module): path for path, module in model.named_modules()}
    return {
        name: first[id(child)]
        for path, module in model.named_modules()
        for part, child in module._modules.items()
        if child is not None and not is_described(child) and first[id(child)] != (name := joined(path, part))
    }


def joined(path: str, name: str) -> str:
    """The name of a module's part."""
    return f"{path}.{name}" if path else name


def share_modules(model: nn.Module, shared: Any) -> None:
    """Put modules under second names too, as ``shared_modules`` found them."""
    modules = dict(model.named_modules())
    for name, first in dict(shared).items():
        path, _, part = name.rpartition(".")
        module, parent = modules[first], modules[path]
        old = parent._modules[part]
        if module is old:
            continue
        alike = old is not None and type(module) is type(old) and _sizes(module) == _sizes(old)
        if not alike or is_described(module) or any(inner is parent for inner in module.modules()):
            raise ValueError(f"{name} cannot be {first}")
        parent._modules[part] = module


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {key: slot.tensor.shape for key, slot in slots(module).items()}


def match(
    blueprint: Blueprint,
    stored: Mapping[str, tuple[list[int], str]],
    aliases: Mapping[str, str],
    expanded: Collection[str],
) -> dict[str, str]:
    """For each slot of the model the tensor of the file that it is filled with.

    Args:
        blueprint: of the model.
        stored: shape and dtype of each tensor of the file.
        aliases: other names of these tensors.
        expanded: those that repeat what the file holds; none but the arguments of a constructor may.

    Raises:
        ValueError: tensors that are missing, left over, or of another shape or kind of dtype.
    """
    found = slots(blueprint.model)
    modules = dict(blueprint.model.named_modules())
    first = {id(module): path for path, module in modules.items()}
    filled: dict[str, str] = {}
    extra = []
    for name in dict.fromkeys([*stored, *aliases]):
        key, slot = aliases.get(name, name), _first_name(name, blueprint.model, first)
        if slot not in found:
            extra.append(name)
        elif filled.setdefault(slot, key) != key and 0 not in stored[key][0]:
            raise ValueError(f"{name} and {filled[slot]} are two tensors and one in the model")
    missing = found.keys() - filled.keys()
    if missing or extra:
        raise ValueError(f"missing tensors {sorted(missing)[:9]}, left over {sorted(extra)[:9]}")
    given = {id(tensor) for tensor in blueprint.given}
    for slot, key in filled.items():
        (shape, dtype), built = stored[key], found[slot].tensor
        if tuple(shape) != tuple(built.shape):
            raise ValueError(f"{slot} is {tuple(shape)}, expected {tuple(built.shape)}")
        if key in expanded and id(built) not in given:  # a module that lays out its own weights would repeat it
            raise ValueError(f"{slot} repeats its numbers (an expanded tensor); make it contiguous")
        _check_kind(slot, dtype, built, id(built) in given)
    _check_one_dtype(blueprint, {slot: stored[key][1] for slot, key in filled.items()}, found, given)
    return filled


def _first_name(name: str, model: nn.Module, first: Mapping[int, str]) -> str | None:
    """The first name of a tensor's slot: files of before named each path to a shared module."""
    *path, tensor = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return None if module is None else joined(first[id(module)], tensor)


def _check_kind(slot: str, dtype: str, built: Tensor, is_given: bool) -> None:
    expected = str(built.dtype).removeprefix("torch.")
    any_floating = built.is_floating_point() and not is_given and dtype in DTYPES
    is_flag = dtype == "bool" and not built.ndim and not isinstance(built, nn.Parameter)  # ActNorm's, of before
    if dtype != expected and not (any_floating and (is_flag or DTYPES[dtype].is_floating_point)):
        raise ValueError(f"{slot} is {dtype}, expected {'floating point' if any_floating else expected}")


def _check_one_dtype(
    blueprint: Blueprint, dtypes: Mapping[str, str], found: Mapping[str, Slot], given: set[int]
) -> None:
    """Raise where one of linfast's modules would hold weights of two dtypes; a norm may have its own."""
    owner: dict[int, nn.Module] = {}
    for part in blueprint.parts:  # the innermost first
        for module in part.modules():
            owner.setdefault(id(module), part)
    first: dict[int, str] = {}
    for slot, (module, _, tensor) in found.items():
        part = owner.get(id(module), module)
        plain = tensor.ndim and tensor.is_floating_point() and id(tensor) not in given
        if not plain or isinstance(module, nn.GroupNorm) or not _is_ours(part):
            continue
        other = first.setdefault(id(part), slot)
        if dtypes[slot] != dtypes[other]:
            raise ValueError(f"{slot} is {dtypes[slot]} and {other} is {dtypes[other]}")


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "linfast"
