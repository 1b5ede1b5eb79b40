"""What a saved file says of a model's modules, as JSON; ``blueprint`` builds them again.

The architecture is read off the modules themselves: every class keeps each argument
of its constructor as an attribute of the same name (``_config_names`` renames one that
would clash). What was constructed that way is constructed that way again, so a file
can name only classes that linfast, or ``register``, knows: loading runs no foreign code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import flows, operators
from .linearizer import Linearizer
from .scale_maps import ScaleMap

__all__ = [
    "DTYPES",
    "checked_number",
    "deeper",
    "describe",
    "is_described",
    "register",
    "registered",
]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip
# Of Python's 1000 frames an operator inside others takes 3 or fewer when called, another module 10 or fewer.
_FRAMES, _OPERATOR_FRAMES, _MOST_FRAMES = 10, 3, 750
_LARGEST = 2**63 - 1

_Class = TypeVar("_Class", bound=type)
_CLASSES: dict[str, type] = {}


def register(cls: _Class) -> _Class:
    """Class decorator: let ``save`` and ``load`` handle modules of this class.

    Each constructor argument must be kept as an attribute of the same name. ``load`` runs the constructor on
    the meta device: it must not read the values of tensors that it makes, and keep them as parameters or buffers.

    Raises:
        TypeError: not a class of modules.
        ValueError: another class of this name is registered.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls must be a subclass of torch.nn.Module; got {cls!r}")
    if _CLASSES.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"a class named {cls.__name__!r} is registered already")
    return cls


for _cls in (
    flows.ActNorm, flows.AdditiveCoupling, flows.AffineCoupling, flows.Conditioned, flows.ConvNet,
    flows.Flow, flows.Householder, flows.Inverse, flows.MLP, flows.Mix, flows.Permute, flows.Squeeze,
    flows.UNet,
    operators.BlockDiagonal, operators.Dense, operators.DepthwiseConv, operators.Diagonal,
    operators.LowRank, operators.Projection, operators.TimeDepthwiseConv, operators.TimeDiagonal,
    operators.TimeLowRank,
    operators.base.Product, operators.base.Scaled, operators.base.Sum, operators.base.Transposed,
    Linearizer,
):  # fmt: skip
    register(_cls)


def registered(name: object) -> type[nn.Module] | None:
    """The registered class of this name."""
    return _CLASSES.get(name) if isinstance(name, str) else None


def is_described(module: nn.Module) -> bool:
    """Whether a file says how to construct this module: its class is registered."""
    return registered(type(module).__name__) is type(module)


def describe(model: nn.Module) -> Any:
    """The architecture of a model as JSON.

    Raises:
        TypeError: a part whose class or argument cannot be described (see ``register``).
        ValueError: a number that JSON has not, or parts too deep inside one another.
    """
    return _describe(model, {}, 0, "the model")


def _describe(value: Any, seen: dict[int, int], depth: int, name: str) -> Any:
    """JSON of a constructor argument of this name; a module seen before becomes a reference to it."""
    if isinstance(value, nn.ModuleList):
        return {"list": [_describe(item, seen, depth, name) for item in value]}
    if isinstance(value, nn.Module):
        return _describe_module(value, seen, depth)
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, ScaleMap):
        return {"scale_map": {key: checked_number(number, name) for key, number in asdict(value).items()}}
    if isinstance(value, (tuple, list)):
        return {"list": [_describe(item, seen, depth, name) for item in value]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"cannot save {name}, a dictionary whose keys are not strings: {list(value)}")
        return {"dict": {key: _describe(item, seen, depth, name) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return checked_number(value, name)
    raise TypeError(f"cannot save {name}, an argument of type {type(value).__name__}")


def _describe_tensor(value: Tensor) -> dict[str, Any]:
    """Shape and dtype, which the constructor may check; of integers, which it may use, the values too."""
    described = {
        "tensor": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "parameter": isinstance(value, nn.Parameter),
    }
    readable = value.dtype in DTYPES.values() and value.layout is torch.strided and not value.is_meta
    return {**described, "values": value.tolist()} if readable and not value.is_floating_point() else described


def _describe_module(module: nn.Module, seen: dict[int, int], depth: int) -> Any:
    if id(module) in seen:
        return {"same": seen[id(module)]}
    kind = type(module).__name__
    if not is_described(module):
        raise TypeError(f"cannot save a {kind}: register its class with linfast.io.register{_advice(module)}")
    depth = deeper(depth, type(module))
    rename: Mapping[str, str] = getattr(module, "_config_names", {})
    arguments = {}
    for name in _argument_names(type(module)):
        if not hasattr(module, rename.get(name, name)):
            raise TypeError(f"cannot save a {kind}: it keeps no attribute {name!r}, an argument of its constructor")
        value = getattr(module, rename.get(name, name))
        arguments[name] = _describe(value, seen, depth, f"{kind}: {name}")
    seen[id(module)] = len(seen)
    return {"class": kind, "arguments": arguments}


def _advice(module: nn.Module) -> str:
    parametrized = hasattr(module, "parametrizations")
    return "; remove its parametrizations (torch.nn.utils.parametrize) first" if parametrized else ""


def _argument_names(cls: type) -> list[str]:
    if cls.__init__ is nn.Module.__init__:  # type: ignore[misc]
        return []
    return list(inspect.signature(cls.__init__).parameters)[1:]  # type: ignore[misc]


def checked_number(value: Any, name: str) -> Any:
    """What is no number, or is one that a file may hold; ValueError for others."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"{name} must be an integer of 64 bits at most")
    return value


def deeper(depth: int, cls: type) -> int:
    """The depth inside a module of this class; ValueError where it could not be called any more."""
    depth += _OPERATOR_FRAMES if issubclass(cls, operators.LatentOperator) else _FRAMES
    if depth > _MOST_FRAMES:
        raise ValueError("its modules lie too deep inside one another")
    return depth
