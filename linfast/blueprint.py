"""Building what ``architecture.describe`` described, on the meta device: modules without numbers.

No constructor may run away with what a file says: its arguments are of the types that its signature
names, modules are shared in so many ways at most, and it makes about as many tensors as the file holds.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .architecture import DTYPES, checked_number, deeper, registered
from .scale_maps import ScaleMap

__all__ = ["Blueprint", "build", "size_list"]

_MOST_PATHS = 100_000  # ways to a module from the root, all modules together: state_dict() and to() follow each
_CALLS, _CALLS_PER_TENSOR = 20_000, 100  # of torch while building; linfast's own modules take 15 a tensor at most


class Blueprint(NamedTuple):
    """A model without numbers, the modules that the architecture names, and the tensors that it gives them."""

    model: nn.Module
    parts: list[nn.Module]
    given: list[Tensor]


def build(architecture: Any, tensors: int) -> Blueprint:
    """The model that ``describe`` described, on the meta device.

    Args:
        architecture: what ``describe`` returned.
        tensors: how many the file holds.

    Raises:
        ValueError: an architecture that names, takes or makes what it may not.
    """
    builder = _Builder()
    try:
        with torch.device("meta"), _CallLimit(_CALLS + _CALLS_PER_TENSOR * tensors):
            model = builder.module(architecture, 0)
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a constructor raises what it likes at arguments that it was never meant to see
        raise ValueError(f"the architecture cannot be built ({_first_line(error)})") from error
    for path, module in model.named_modules():
        _check_holds_none(path, module)
    return Blueprint(model, builder.parts, builder.given)


class _Refused(Exception):
    """An error that says all there is to say."""


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] if isinstance(error, (ValueError, TypeError)) else f"{error!r:.200}"


def _check_holds_none(path: str, module: nn.Module) -> None:
    """Raise where a module keeps a tensor that ``load`` could not fill."""
    kept = {"_parameters", "_buffers", "_modules", "_flat_weights"}  # the last are an LSTM's parameters
    for name, value in vars(module).items():
        if name not in kept and _holds_meta(value):
            raise ValueError(
                f"{type(module).__name__}{f' {path}' if path else ''} keeps {name!r}, a tensor that is neither a "
                "parameter nor a buffer: register it as one"
            )


def _holds_meta(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_meta(item) for item in value)
    return isinstance(value, Tensor) and value.is_meta


class _CallLimit(TorchFunctionMode):
    """Inside, torch is called so many times at most: a size in a file is no licence to make 10^5 layers."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):  # not what puts a setting back, such as the end of torch.no_grad's block
            self.calls -= 1
            if self.calls < 0:
                raise _Refused("the architecture makes far more tensors than the file holds")
        return result


class _Builder:
    """Builds nodes of an architecture; ``parts`` are the modules in the order they were described."""

    def __init__(self) -> None:
        self.parts: list[nn.Module] = []
        self.given: list[Tensor] = []
        self._paths: list[int] = []  # ways from each part to the modules in it, itself among them
        self._so_far = [0]  # the same of the parts under construction, the innermost last

    def module(self, node: Any, depth: int) -> nn.Module:
        name = _of_type(dict, node)["class"]
        cls = registered(name)
        if cls is None:
            raise _Refused(f"unknown class {name!r:.60}: register it with linfast.io.register first")
        depth = deeper(depth, cls)
        self._so_far.append(1)
        arguments = {}
        for key in _of_type(dict, node["arguments"]):  # loops: a comprehension is a frame of Python's 1000 more
            arguments[key] = self._value(node["arguments"][key], depth, f"{name}: {key}")
        try:
            self.parts.append(_call(cls, arguments))
        except RuntimeError as error:
            if isinstance(error, RecursionError):
                raise
            why = str(error).partition("\n")[0]
            raise _Refused(f"a {name} cannot be constructed on the meta device ({why})") from error
        self._paths.append(self._so_far.pop())
        return self._reached(len(self.parts) - 1)

    def _reached(self, index: int) -> nn.Module:
        self._so_far[-1] += self._paths[index]
        if self._so_far[-1] > _MOST_PATHS:
            raise _Refused(f"the architecture shares modules: more than {_MOST_PATHS} ways lead to them")
        return self.parts[index]

    def _value(self, node: Any, depth: int, name: str) -> Any:
        """The argument of this name."""
        if node is None or isinstance(node, (bool, int, float, str)):
            return checked_number(node, name)
        if not isinstance(node, dict):
            raise _Refused(f"unknown entry in the architecture: {name} is {node!r:.60}")
        if "class" in node:
            return self.module(node, depth)
        if "same" in node:
            return self._same(node["same"])
        if "tensor" in node:
            return self._tensor(node)
        if "scale_map" in node:
            numbers = _of_type(dict, node["scale_map"]).items()
            return _call(ScaleMap, {key: checked_number(number, name) for key, number in numbers})
        if "list" not in node and "dict" not in node:
            raise _Refused(f"unknown entry in the architecture: {name} has {sorted(node)!r:.60}")
        items = dict(enumerate(_of_type(list, node["list"]))) if "list" in node else _of_type(dict, node["dict"])
        built = {}
        for key in items:
            built[key] = self._value(items[key], depth, name)
        return list(built.values()) if "list" in node else built

    def _same(self, index: Any) -> nn.Module:
        if type(index) is not int or not 0 <= index < len(self.parts):
            raise _Refused(f"the architecture refers to module {index!r:.60}, which was not built before")
        return self._reached(index)

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        shape, dtype = size_list(node["tensor"]), DTYPES.get(node["dtype"])
        if dtype is None:
            raise TypeError(f"tensors of dtype {node['dtype']!r:.60} are not saved")
        value = _integers(node["values"], shape, dtype) if "values" in node else torch.empty(shape, dtype=dtype)
        self.given.append(nn.Parameter(value) if node.get("parameter", False) else value)
        return self.given[-1]


def _of_type(cls: type, value: Any) -> Any:
    if not isinstance(value, cls):
        raise TypeError(f"expected a {cls.__name__}, got {value!r:.60}")
    return value


def size_list(value: Any) -> list[int]:
    """A list of integers that are not negative; TypeError for anything else."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise TypeError(f"expected a list of sizes, got {value!r:.60}")
    return value


def _integers(values: Any, shape: list[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the integers or booleans in a file, on the CPU: a constructor may read them."""
    given = torch.tensor(values, device="cpu")
    if not given.numel() and math.prod(shape) == 0:  # nested lists do not say all of an empty shape
        return torch.empty(shape, dtype=dtype, device="cpu")
    value = given.to(dtype)
    same_kind = not given.is_floating_point() and (given.dtype is torch.bool) == (dtype is torch.bool)
    if list(given.shape) != shape or not same_kind or not torch.equal(value.to(given.dtype), given):
        raise ValueError(
            f"values of {given.dtype} and shape {list(given.shape)} for a tensor of {dtype} and {shape}"
        )
    return value


def _call(cls: type, arguments: dict[str, Any]) -> Any:
    """cls(**arguments), where these are of the types that the constructor's signature names."""
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # a foreign class whose annotations cannot be read takes what it takes
        hints = {}
    parameters = inspect.signature(cls).parameters
    for name, value in arguments.items():
        left_out = value is None and name in parameters and parameters[name].default is None
        if name in hints and not left_out and not _fits(value, hints[name]):
            shown = f"a {type(value).__name__}" if isinstance(value, (nn.Module, Tensor)) else f"{value!r:.60}"
            raise TypeError(f"{cls.__name__}: {name} must be {_hint_name(hints[name])}; got {shown}")
    return cls(**arguments)


def _hint_name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type)
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as far as what a file holds can differ in it."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Any or not isinstance(origin, type) or getattr(origin, "_is_protocol", False):
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, dict)
    if issubclass(origin, (str, Tensor, nn.Module)) or not issubclass(origin, Iterable):
        return isinstance(value, origin)
    if not isinstance(value, list):
        return False
    if origin is tuple and arguments and Ellipsis not in arguments:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return not arguments or all(_fits(item, arguments[0]) for item in value)
